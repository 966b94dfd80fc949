"""Pictures of the demo for the README: a run on the default model, at desktop and phone width.

python benchmarks/demo_screenshots.py [OPTIONS OF minference-jax demo]    # needs the extras demo and browser, Chromium
"""

import re
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PLOTS = Path(__file__).parent / "plots"
SIZES = {"desktop": (1180, 900), "phone": (390, 844)}
MOST_MS = 3_600_000
LONGER = 7000  # tokens


def run(page: Page) -> None:
    """Runs the example that the page begins with, then a longer one, then looks at a head."""
    page.click("#run")
    finish(page)
    page.click("#example button >> nth=0")
    page.wait_for_timeout(500)  # a field that was just drawn is given its first value once more
    page.fill("#length input[type=number]", str(LONGER))
    page.press("#length input[type=number]", "Enter")
    page.click("#make")
    page.wait_for_function("wanted => document.querySelector('#text textarea').value.length > 3 * wanted", arg=LONGER)
    page.click("#example button >> nth=0")
    page.click("#run")
    finish(page)
    for name in ("#history", "#inspect"):
        page.click(f"{name} button >> nth=0")
    page.wait_for_timeout(2000)  # what is in them is made when they open
    page.fill("#layer input", "10")
    page.fill("#head input", "3")
    page.click("#show")
    finish(page)


def finish(page: Page) -> None:
    """Waits for the end of what runs."""
    page.wait_for_selector("#cancel:not([disabled])", timeout=MOST_MS)
    page.wait_for_selector("#run:not([disabled])", timeout=MOST_MS)
    print(page.inner_text("#status"), "|", page.inner_text("#numbers").replace("\n", " "), flush=True)


def shoot(page: Page) -> None:
    """Writes one picture for each width, in few colours."""
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(500)
        path = PLOTS / f"demo_{name}.png"
        if name == "desktop":
            page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": 1500})
        else:
            page.evaluate("document.querySelector('#run').scrollIntoView()")
            page.screenshot(path=path)
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            sys.exit(f"the page is {wide} pixels wide on a screen of {width}")
        compress(path)
        print(path, path.stat().st_size)


def compress(path: Path) -> None:
    """Fewer colours, so that the picture is small."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    """Serves, runs, shoots."""
    command = [Path(sys.executable).parent / "minference-jax", "demo", *sys.argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            said = server.stdout.readline() if server.stdout else ""
            address = re.match(r"http://\S+", said)
            if address is None:
                sys.exit(f"the demo did not start: {said}")
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
            page = browser.new_page(viewport={"width": 1180, "height": 900})
            page.goto(address[0])
            page.wait_for_selector("#run")
            run(page)
            shoot(page)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
