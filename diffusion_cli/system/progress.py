"""Progress bars, the only output that may move the cursor."""

import sys
from typing import Any

from tqdm import tqdm

from diffusion_cli.system.terminal import Output
from diffusion_cli.system.untrusted import escaped


class ProgressBar(tqdm):
    """A progress bar of tqdm on stderr; control characters in its description are escaped."""

    def __init__(self, *arguments: Any, desc: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, desc=desc and escaped(desc), file=_Moving(sys.stderr), **options)


class _Moving:
    """A stream of text that may move the cursor between lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm.write clears the bars of the stream that it writes to.
        return self._stream is getattr(other, "_stream", other) or self._stream is other

    def __hash__(self) -> int:
        return hash(self._stream)

    def write(self, text: str) -> int:
        """Write text."""
        if isinstance(self._stream, Output):
            return self._stream.write(text, moves=True)
        return self._stream.write(text)
