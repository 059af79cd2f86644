"""Conditions: inputs of a model besides the noised image, such as a class, attributes, an image or a text."""

from diffusion_cli.conditions.condition import Condition
from diffusion_cli.conditions.description import AttributeDescription, Conditions, TextDescription
from diffusion_cli.conditions.image import ImageCondition, NoImage

__all__ = ["AttributeDescription", "Condition", "Conditions", "ImageCondition", "NoImage", "TextDescription"]
