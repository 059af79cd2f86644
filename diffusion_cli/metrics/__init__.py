"""Metrics of samples and models, with the protocol by which they were measured."""

from diffusion_cli.metrics.base import (
    EvaluatedModel,
    FeatureView,
    Metric,
    MetricState,
    MetricValue,
    ModelMetric,
    SampleBatch,
)
from diffusion_cli.metrics.class_accuracy import ClassifierScore
from diffusion_cli.metrics.classification_accuracy import ClassificationAccuracyScore
from diffusion_cli.metrics.clip_score import CLIPScore
from diffusion_cli.metrics.evaluation import (
    Evaluation,
    EvaluationCancelled,
    conditions_of,
    evaluate,
    evaluate_model,
    require,
)
from diffusion_cli.metrics.features.auto import auto_features
from diffusion_cli.metrics.features.base import FeatureBatch, Features
from diffusion_cli.metrics.features.classifier import ClassifierFeatures
from diffusion_cli.metrics.features.clip import CLIPFeatures
from diffusion_cli.metrics.features.dinov2 import DINOv2Features
from diffusion_cli.metrics.features.inception import InceptionFeatures
from diffusion_cli.metrics.features.lpips import LPIPSDistance
from diffusion_cli.metrics.features.registry import FeatureExtractors, cache_folder
from diffusion_cli.metrics.frechet import (
    FrechetDistance,
    FrechetDistanceDINOv2,
    SpatialFrechetDistance,
    frechet_distance,
)
from diffusion_cli.metrics.geometry import Geometry, chamfer_distances, neighbour_accuracy
from diffusion_cli.metrics.inception_score import InceptionScore, inception_score
from diffusion_cli.metrics.inversion import Inversion
from diffusion_cli.metrics.kernel import CLIPDistance, KernelDistance, gaussian_mmd, polynomial_mmd
from diffusion_cli.metrics.label_error import LabelError
from diffusion_cli.metrics.latents import LatentMoments
from diffusion_cli.metrics.likelihood import FlowLikelihood, VariationalBound
from diffusion_cli.metrics.lpips import LPIPS
from diffusion_cli.metrics.memorization import Memorization
from diffusion_cli.metrics.moments import Moments
from diffusion_cli.metrics.originals import PSNR, SSIM
from diffusion_cli.metrics.precision_recall import DensityCoverage, PrecisionRecall
from diffusion_cli.metrics.protocol import (
    Report,
    Result,
    append_history,
    history_table,
    newest,
    notes_on_seeds,
    read_history,
    unlike,
)
from diffusion_cli.metrics.reconstruction import (
    ReconstructedSamples,
    Reconstruction,
    ReconstructionFrechetDistance,
)
from diffusion_cli.metrics.reference import DatasetReference, GivenReference, RealImages, Reference
from diffusion_cli.metrics.repeats import DEVIATION, averaged, parts
from diffusion_cli.metrics.rows import GrowingRows, Rows
from diffusion_cli.metrics.samples import GivenSamples, Samples
from diffusion_cli.metrics.spectrum import Spectrum, band_powers

__all__ = [
    "DEVIATION",
    "LPIPS",
    "PSNR",
    "SSIM",
    "CLIPDistance",
    "CLIPFeatures",
    "CLIPScore",
    "ClassificationAccuracyScore",
    "ClassifierFeatures",
    "ClassifierScore",
    "DINOv2Features",
    "DatasetReference",
    "DensityCoverage",
    "EvaluatedModel",
    "Evaluation",
    "EvaluationCancelled",
    "FeatureBatch",
    "FeatureExtractors",
    "FeatureView",
    "Features",
    "FlowLikelihood",
    "FrechetDistance",
    "FrechetDistanceDINOv2",
    "Geometry",
    "GivenReference",
    "GivenSamples",
    "GrowingRows",
    "InceptionFeatures",
    "InceptionScore",
    "Inversion",
    "KernelDistance",
    "LPIPSDistance",
    "LabelError",
    "LatentMoments",
    "Memorization",
    "Metric",
    "MetricState",
    "MetricValue",
    "ModelMetric",
    "Moments",
    "PrecisionRecall",
    "RealImages",
    "ReconstructedSamples",
    "Reconstruction",
    "ReconstructionFrechetDistance",
    "Reference",
    "Report",
    "Result",
    "Rows",
    "SampleBatch",
    "Samples",
    "SpatialFrechetDistance",
    "Spectrum",
    "VariationalBound",
    "append_history",
    "auto_features",
    "averaged",
    "band_powers",
    "cache_folder",
    "chamfer_distances",
    "conditions_of",
    "evaluate",
    "evaluate_model",
    "frechet_distance",
    "gaussian_mmd",
    "history_table",
    "inception_score",
    "neighbour_accuracy",
    "newest",
    "notes_on_seeds",
    "parts",
    "polynomial_mmd",
    "read_history",
    "require",
    "unlike",
]  # fmt: skip
