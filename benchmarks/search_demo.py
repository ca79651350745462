"""Show searching as its users see it: the answers of a command, a sheet, and the page in a headless Chromium.

    make quickstart
    python -m benchmarks.search_demo [outputs/quickstart-index] [--out outputs/search-demo]

It needs the extra icone_hf[app], playwright and Debian's chromium.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

SENTENCE = "an animal to the left of a fruit"
WINDOWS = {"desktop": (1280, 900, "light"), "phone": (360, 740, "light"), "dark": (1280, 900, "dark")}
ARGUMENTS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"


def take_pictures(address: str, out: Path) -> None:
    """Search on the page; save it as a picture, in windows of several kinds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS.split())
        for name, (width, height, scheme) in WINDOWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.goto(address)
            page.fill("#sentence input", SENTENCE)
            page.press("#sentence input", "Enter")
            page.wait_for_selector("#results .found button")
            page.wait_for_function("[...document.images].every(one => one.complete)")
            page.wait_for_timeout(500)  # what fades in
            page.screenshot(path=out / f"page_{name}.png")
            print(out / f"page_{name}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", nargs="?", type=Path, default=Path("outputs/quickstart-index"))
    parser.add_argument("--out", type=Path, default=Path("outputs/search-demo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    icone = [sys.executable, "-m", "icone_hf"]
    sheet = str(options.out / "found.png")
    subprocess.run([*icone, "search", str(options.index), SENTENCE, "--k", "5", "--grid", sheet], check=True)
    subprocess.run([*icone, "index", str(options.index), "--check"], check=True)
    server = subprocess.Popen([*icone, "app", str(options.index), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()  # it begins with the address, once the page can be opened
        if not line:
            raise SystemExit("The page did not start.")
        take_pictures(line.split()[0], options.out)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
