"""Reports: pictures of results, and the page about a run."""

from diffusion_cli.images import (
    Writer,
    grid,
    read_images,
    read_stored,
    rows,
    save_gif,
    save_grid,
    save_png,
    save_rows,
    save_stored,
)

__all__ = [
    "Writer",
    "grid",
    "read_images",
    "read_stored",
    "rows",
    "save_gif",
    "save_grid",
    "save_png",
    "save_rows",
    "save_stored",
]
