"""Takes the screenshots of the playground that README shows, from a running server with the embedded models.

    python -m scripts.screenshots http://127.0.0.1:8000 [FONT]

FONT is a font family, for systems without a good default font.
"""

import asyncio
import base64
import io
import sys
from pathlib import Path

from PIL import Image

from tests.support.browser import Page, chromium

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
FIELDS = {
    "#best_of": "16",
    "#max_tokens": "40",
    "#seed": "7",
    "#price": "0.6",
    "#prompt": "I saw this movie last night and",
}
NUM_COLOURS = 128
"""Size of the palette: the page has few colours, and a palette makes the files a third as large."""


async def take(page: Page, name: str) -> None:
    await asyncio.sleep(1)  # until animations have ended
    await page.js("document.activeElement.blur()")
    screenshot = await page.send("Page.captureScreenshot", format="png")
    picture = Image.open(io.BytesIO(base64.b64decode(screenshot["data"]))).convert("RGB")
    file = PICTURES / f"playground-{name}.png"
    picture.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"wrote {file}, {file.stat().st_size} bytes")


async def main(address: str, font: str = "system-ui") -> None:
    async with chromium() as page:
        await page.send("Emulation.setScrollbarsHidden", hidden=True)
        await page.resize(1280, 1100)
        await page.go(f"{address}/")
        await page.js(f"document.documentElement.style.fontFamily = {font!r}")
        await page.until("document.querySelector('#strategy').options.length")
        await page.js("document.querySelector('[name=kind][value=completion]').click()")
        for field, text in FIELDS.items():
            await page.fill(field, text)
        await page.js("document.querySelector('#more').open = false")
        await page.press("Enter", control=True)
        await page.until("document.querySelector('[data-state=winner]')")
        await take(page, "light")
        await page.choose("#theme", "dark")
        await page.resize(390, 844, scale=2, mobile=True)
        await page.js("document.querySelector('#results').scrollIntoView()")
        await take(page, "phone-dark")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
