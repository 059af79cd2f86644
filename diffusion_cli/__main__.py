"""Entry point of `diffuse`, and of `python -m diffusion_cli` for launchers that start modules."""

from diffusion_cli.system.signals import end_at_signals


def main() -> None:
    """Run `diffuse`, with signal handlers installed before the slow imports."""
    end_at_signals()
    from diffusion_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
