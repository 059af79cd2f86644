"""One sentence about each number of the report."""

from collections.abc import Mapping
from typing import Any

from diffusion_cli.metrics import Result

FRECHET = ("fid", "sfid", "fd_dinov2", "frechet", "rfid", "rfrechet", "rfd_dinov2")
SENTENCES = {
    "fid": "Distance between the features of the samples and of real images; smaller is better.",
    "rfid": "Distance between the features of reconstructions and of their originals; smaller is better.",
    "kid": "Squared distance between the features of the samples and of real images; smaller is better, also below 0.",
    "cmmd": "Distance between the CLIP features of the samples and of real images; smaller is better.",
    "is": "How clear and how varied the classes of the samples are; at least 1, and larger is better.",
    "precision": "Share of the samples that are near real images, 0 to 1; larger is better.",
    "recall": "Share of the real images that are near samples, 0 to 1; larger is better.",
    "density": "How many real images the samples are near to, relative to real data; about 1 is as dense as real data.",
    "coverage": "Share of the real images with a sample in their neighbourhood, 0 to 1; larger is better.",
    "clip_score": "Agreement of the samples with their prompts, or with the names of their classes; larger is better.",
    "class_accuracy": "Share of the samples that a classifier assigns to their own class, 0 to 1; larger is better.",
    "classification_accuracy_score": "Accuracy on real images of a classifier trained on samples; larger is better.",
    "class_entropy": "Uncertainty of a classifier about the class of a sample, in nats; smaller is clearer.",
    "memorization": "Share of the samples nearer to a training image than any validation image is; 0 is best.",
    "lpips": "Perceptual distance between images and their originals; smaller is better.",
    "lpips_diversity": "Perceptual distance between pairs of samples; larger is more varied.",
    "psnr": "Difference of images from their originals, in decibels; larger is better.",
    "ssim": "Similarity of images to their originals, at most 1; larger is better.",
    "chamfer": "Mean distance of a sample to the nearest real shape; smaller is better.",
    "minimum_matching_distance": "Mean distance of a real shape to the nearest sample; smaller is better.",
    "shape_coverage": "Share of the real shapes that are the nearest of some sample, 0 to 1; larger is better.",
    "nearest_neighbour_accuracy": "Accuracy of telling samples from real shapes by the nearest neighbour; 0.5 is best.",
    "watertight": "Share of the samples with a closed surface, 0 to 1; 1 is best.",
    "volume": "Mean volume of the samples; that of real shapes is best.",
    "spectrum": "Relative error of the mean power of the samples in octave bands; smaller is better.",
    "bits_per_dim_bound": "Upper bound of the bits per value that encode an image; smaller is better.",
    "bits_per_dim_flow": "Bits per value that encode an image, by the probability flow; smaller is better.",
    "inversion_rmse": "Error of images that are encoded to noise and decoded again; smaller is better.",
    "latents_deviation": "Largest deviation of a latent channel from mean 0 and deviation 1; 0 is best.",
}  # fmt: skip


def _ratio_of_distances(ratio: float) -> str:
    return (
        f"The median distance of samples to their nearest training image is {ratio:.2g} times that of real images; far "
        "below 1 is a sign of copies."
    )


def explained(result: Result) -> str:
    """Return a sentence about a result; empty for a metric that is not known here."""
    metric = _metric(result.name)
    if metric == "memorization" and "median_distance_ratio" in result.details:
        return f"{SENTENCES[metric]} {_ratio_of_distances(result.details['median_distance_ratio'])}"
    sentence = SENTENCES.get({"rfrechet": "rfid", "rfd_dinov2": "rfid"}.get(metric, metric), "")
    if metric not in FRECHET:
        return sentence
    return _beside_real(result.details, result.protocol) or sentence or SENTENCES["fid"]


def _metric(name: str) -> str:
    """Return the metric of a name such as kid_classifier, which ends with its features."""
    known = {*SENTENCES, *FRECHET}
    parts = name.split("_")
    for count in range(len(parts), 0, -1):
        if (metric := "_".join(parts[:count])) in known:
            return metric
    return name


def _beside_real(details: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Return a Frechet distance relative to that of two sets of real images; empty if that is not known.

    The distance depends on the number of images, so the ratio for equal numbers comes first.
    """
    equal, number = details.get("equal_size_ratio"), details.get("equal_size_images")
    if isinstance(equal, int | float) and isinstance(number, int | float):
        return (
            f"With {number:,} images each, {equal:.2g} times as far from the reference as other real images are. "
            f"{_beside_one(equal)}"
        )
    ratio, images = details.get("ratio_to_reference"), details.get("reference_distance_images")
    samples = protocol.get("samples")
    if not isinstance(ratio, int | float) or not isinstance(images, int | float):
        return ""
    if isinstance(samples, int | float) and samples != images:
        return (
            f"{ratio:.2g} times the distance of {images:,} other real images from the reference. The ratio depends on "
            f"the numbers of images, and there are {samples:,} samples."
        )
    return f"{ratio:.2g} times as far from the reference as other real images are. {_beside_one(ratio)}"


def _beside_one(ratio: float) -> str:
    """Return the meaning of a ratio for equal numbers of images."""
    if ratio >= 1:
        return "1 is as close as real images."
    return "1 is as close as real images; below 1 is chance, or samples that resemble training images."
