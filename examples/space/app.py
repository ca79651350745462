"""A Hugging Face Space: this folder, the checkpoint as `model/`, and an index as `index/` or images as `pictures/`."""

from pathlib import Path

from icone_hf.cli import main

if Path("pictures").is_dir() and (code := main(["index", "model", "pictures", "index"])):
    raise SystemExit(code)
raise SystemExit(main(["app", "index", "--model", "model", "--host", "0.0.0.0"]))
