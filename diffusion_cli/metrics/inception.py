"""The InceptionV3 network of the published FID and Inception scores."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features import FeatureBatch, Features


class InceptionFeatures(Features):
    """InceptionV3 of the original FID, by torch-fidelity: 2048 features, 1008 logits without their bias.

    `weights` is a file of torch-fidelity's weights; null looks in torch's download folder, and fetches
    them there once. One channel is repeated to three. FID and Inception score equal those of torch-fidelity.

    Raises FileNotFoundError if there is no such file and it cannot be fetched, ValueError if it holds
    anything but the weights of this network, or images have neither 1 nor 3 channels.

    Source: Heusel et al. 2017 (FID); Salimans et al. 2016 (Inception score).
    """

    name = "inception"
    dim = 2048
    classes = 1008
    resize = "bilinear to 299x299, not antialiased, as TensorFlow 1"
    note = ""
    chunk = 64

    def __init__(
        self, dataset: Dataset, cache_dir: Path, device: torch.device, *, weights: str | None
    ) -> None:
        channels = dataset.shape[0]
        if channels not in (1, 3):
            raise ValueError(
                f"features=inception: takes 1 or 3 channels; images of {dataset.name} have {channels}"
            )
        path = fetched_weights() if weights is None else Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"features.weights={weights}: no such file; null fetches the published one"
            )
        content = path.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        self.device = device
        self.network = load_network(path, content).to(device)

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(*self.network(images.expand(-1, 3, -1, -1)))


def fetched_weights() -> Path:
    """Where the published weights lie, in torch's download folder, fetched if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    name = URL_INCEPTION_V3.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256_start = Path(name).stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=sha256_start)
        except (OSError, RuntimeError) as error:  # no network; or what came is not what was published
            raise FileNotFoundError(
                f"features.weights=null: the Inception weights are not at {path} and could not be fetched "
                f"({error}); get {name} from torch-fidelity's GitHub releases and put it there, or give its "
                "path as features.weights"
            ) from error
    return path


def load_network(path: Path, content: bytes) -> Any:
    """torch-fidelity's InceptionV3 with the weights that a file holds, read as tensors and nothing else."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever file it is given, so it is given what was just read, written anew.
        trusted = io.BytesIO()
        torch.save(state, trusted)
        trusted.seek(0)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=trusted
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"features.weights={path}: does not hold the weights of torch-fidelity's InceptionV3 ({reason}); "
            "fetch the file again"
        ) from error
