"""Forms: in what numbers and in what files the things lie that a model makes, and how they look."""

from diffusion_cli.forms.base import Form, Shape, form_of
from diffusion_cli.forms.picture import Picture, to_bytes

__all__ = ["Form", "Picture", "Shape", "form_of", "to_bytes"]
