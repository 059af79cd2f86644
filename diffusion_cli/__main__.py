"""The `diffuse` program, which is also `python -m diffusion_cli` for launchers that start modules."""

from diffusion_cli.system.signals import end_at_signals


def main() -> None:
    """Run `diffuse`; from the first instant on, before its modules are imported, signals end it in order."""
    end_at_signals()
    from diffusion_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
