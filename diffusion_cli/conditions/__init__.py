"""Conditions: what a model is told beside the noised image, such as a class, attributes, an image or a text."""

from diffusion_cli.conditions.condition import Condition
from diffusion_cli.conditions.description import AttributeDescription, Conditions, TextDescription

__all__ = ["AttributeDescription", "Condition", "Conditions", "TextDescription"]
