"""Metrics: how good samples are, and the protocol by which that was measured."""

from diffusion_cli.metrics.auto import auto_features
from diffusion_cli.metrics.base import Finding, Measurement, Metric, ModelMetric, Subject
from diffusion_cli.metrics.classifier import ClassifierFeatures
from diffusion_cli.metrics.evaluation import evaluate, examine
from diffusion_cli.metrics.features import FeatureBatch, Features
from diffusion_cli.metrics.frechet import FrechetDistance, frechet_distance
from diffusion_cli.metrics.inception import InceptionFeatures
from diffusion_cli.metrics.inception_score import InceptionScore, inception_score
from diffusion_cli.metrics.inversion import Inversion
from diffusion_cli.metrics.likelihood import FlowLikelihood, VariationalBound
from diffusion_cli.metrics.moments import Moments
from diffusion_cli.metrics.protocol import Report, Result, append_history, read_history, unlike
from diffusion_cli.metrics.real import RealImages

__all__ = [
    "ClassifierFeatures",
    "FeatureBatch",
    "Features",
    "Finding",
    "FlowLikelihood",
    "FrechetDistance",
    "InceptionFeatures",
    "InceptionScore",
    "Inversion",
    "Measurement",
    "Metric",
    "ModelMetric",
    "Moments",
    "RealImages",
    "Report",
    "Result",
    "Subject",
    "VariationalBound",
    "append_history",
    "auto_features",
    "evaluate",
    "examine",
    "frechet_distance",
    "inception_score",
    "read_history",
    "unlike",
]
