"""`python -m diffusion_cli` is `diffuse`, for launchers that start modules."""

from diffusion_cli.cli import main

if __name__ == "__main__":
    main()
