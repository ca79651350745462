"""`icone app`: a page in the browser that searches an index."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from ..search.app_server import serve
from ..search.gallery import Gallery
from . import COMMANDS
from .parsing import parse_arguments


@dataclass
class AppArguments:
    """Hold what `icone app` takes."""

    _argument_group_name = "app"

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets other machines' visitors in."}
    )
    port: int = field(default=7860, metadata={"help": "Port to listen on; 0 for any that is free."})
    model: str | None = field(
        default=None, metadata={"help": "The checkpoint that made the index, if it lies elsewhere now."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"port={self.port} must be from 0 to 65535.")


def app(argv: Sequence[str]) -> None:
    """Run `icone app INDEX`."""
    args, positional = parse_arguments(
        (AppArguments,),
        argv,
        prog="icone app",
        positionals={"index": {"help": "Folder of an index, from icone index."}},
        description=COMMANDS["app"],
    )
    gallery = Gallery.open(positional.index, args.model)
    serve(
        gallery, args.host, args.port, lambda url: print(f"{url} shows {positional.index}. Ctrl+C ends it.", flush=True)
    )
