"""JupyterLab on loopback, driven by headless Chromium.

`python tests/labdriver.py NOTEBOOK FOLDER` runs a copy of a notebook and takes a picture of each widget.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), "/usr/bin/chromium")
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LAB_FLAGS = (
    "--no-browser", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
    "--ServerApp.disable_check_xsrf=True", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
    "--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
)  # fmt: skip
LIVE = ".light-explorer, .light-guess"  # what our widgets are called in the page


@contextlib.contextmanager
def lab(root: Path) -> Iterator[str]:
    """The address of a JupyterLab on `root` with settings of its own; it ends with the block."""
    own = Path(tempfile.mkdtemp(prefix="lab-"))
    settings = own / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    # without this a "Jupyter news" box covers the page
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *LAB_FLAGS,
        f"--port={port}",
        f"--ServerApp.root_dir={root}",
    ]
    command += ["--allow-root"] if os.name == "posix" and os.geteuid() == 0 else []
    log = own / "lab.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=root, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **{name: str(own / folder) for name, folder in folders.items()}},
        )  # fmt: skip
    try:
        wait_for_lab(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
        shutil.rmtree(own, ignore_errors=True)


def wait_for_lab(process: subprocess.Popen, address: str, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api/status", timeout=1).read()
            return
        time.sleep(0.05)
    raise TimeoutError(f"JupyterLab did not answer in {seconds} s:\n{log.read_text()}")


@contextlib.contextmanager
def browser_page(width: int = 1366, height: int = 2400):
    """A page of headless Chromium that reaches only this machine; the console's errors are in `.errors`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(CHROMIUM_FLAGS))
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
            page = context.new_page()
            page.errors = []
            page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            yield page
        finally:
            browser.close()


def open_notebook(page, address: str, name: str, timeout: float = 90_000) -> None:
    page.goto(f"{address}/lab/workspaces/t{time.time_ns()}/tree/{name}?reset", wait_until="domcontentloaded")
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=timeout)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=timeout)
    page.wait_for_function(
        """() => { const w = window.jupyterapp?.shell?.currentWidget;
        return w?.sessionContext?.isReady && w.sessionContext.session?.kernel?.status === 'idle' }""",
        timeout=timeout,
    )


# 'done' when every cell has run, the error of one that failed, else false
FINISHED = """() => {
    const book = window.jupyterapp.shell.currentWidget;
    const code = book.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.source);
    const meant = cell => (cell.model.getMetadata('tags') ?? []).includes('raises-exception');
    const outputs = code.filter(c => !meant(c)).flatMap(c => c.model.outputs.toJSON());
    const failed = outputs.find(o => o.output_type === 'error');
    if (failed) return failed.ename + ': ' + failed.evalue;
    const idle = book.sessionContext.session.kernel.status === 'idle';
    return idle && code.every(c => c.model.executionCount) && 'done';
}"""


def run_all(page, timeout: float = 300_000) -> None:
    """Run every cell and wait until all have. Raises RuntimeError for one that fails and is not meant to."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    result = page.wait_for_function(FINISHED, timeout=timeout).json_value()
    if result != "done":
        raise RuntimeError(f"a cell failed: {result}")


def stripped_copy(notebook: Path, folder: Path, name: str = "live.ipynb") -> Path:
    """A copy without outputs: JupyterLab saves into what it opens, and old pictures could pass for new."""
    book = nbformat.read(notebook, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # a notebook that names no kernel makes JupyterLab ask for one
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(book, folder / name)
    return folder / name


def reveal(page, selector: str = LIVE):
    """All such elements. A long notebook draws only cells near the view: each is scrolled to first."""
    for i in range(page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length")):
        page.evaluate("i => window.jupyterapp.shell.currentWidget.content.scrollToItem(i)", i)
        page.wait_for_timeout(30)
    return page.locator(selector)


def take_pictures(notebook: Path, folder: Path) -> list[Path]:
    """Run a copy of `notebook` and write a PNG of each widget of ours, at the width of a laptop's screen."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root, lab(Path(root)) as address, browser_page() as page:
        stripped_copy(notebook, Path(root))
        open_notebook(page, address, "live.ipynb")
        run_all(page)
        files = []
        for i, widget in enumerate(reveal(page).all()):
            widget.scroll_into_view_if_needed()
            page.wait_for_timeout(300)
            files.append(folder / f"{notebook.stem}-{i:02d}.png")
            widget.screenshot(path=files[-1])
        for error in page.errors:
            print("console:", error, file=sys.stderr)
    return files


if __name__ == "__main__":
    for file in take_pictures(Path(sys.argv[1]), Path(sys.argv[2])):
        print(file)
