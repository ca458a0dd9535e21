"""A real JupyterLab in a real, headless Chromium: what the browser tests and the benchmarks drive."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright

TOKEN = "qlab"
POLLING = 50  # ms: a look in every frame takes the time of what is waited for
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
LAB_FLAGS = [
    "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0",
    f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
]
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
LATE = """(() => { const Real = WebSocket; window.late = 0;
  const later = act => window.late ? setTimeout(act, window.late) : act();
  window.WebSocket = class extends Real {
    send(data) { later(() => super.send(data)); }
    set onmessage(handler) { super.onmessage = handler && (event => later(() => handler(event))); } }; })()"""
OPEN = """async path => { const {shell, commands} = jupyterapp, before = shell.currentWidget;
  await commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await before.sessionContext.shutdown();
  before.dispose(); }"""
KERNEL_READY = """() => { const panel = window.jupyterapp?.shell.currentWidget;
  return !!(panel?.context?.isReady && panel.sessionContext?.session?.kernel?.status === 'idle'); }"""
ALL_RUN = """() => { const panel = jupyterapp.shell.currentWidget;
  const code = Array.from(panel.content.model.cells).filter(c => c.type === 'code' && c.sharedModel.source.trim());
  return panel.sessionContext.session.kernel.status === 'idle' && (code.every(c => c.executionCount)
    || code.some(c => c.sharedModel.outputs.some(o => o.output_type === 'error'))); }"""
CELL_ERRORS = """() => Array.from(jupyterapp.shell.currentWidget.content.model.cells).filter(c => c.type === 'code')
  .flatMap(c => c.sharedModel.outputs.filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`))"""
BACKGROUND = "() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')"
ONLY_OUTPUTS = """.jp-InputArea-editor { display: none !important }  /* half of the elements, and half of axe's time */
body { overflow: visible !important }  /* the body has no height, and axe takes what is beyond it for hidden */"""
NOT_OURS = (  # rules of axe-core on what no notebook decides
    "link-in-text-block",  # JupyterLab underlines no link in Markdown; links differ by colour from the text around
)
HARMLESS = (  # messages of JupyterLab itself that have nothing to do with a figure
    "favicon.ico",
    "Could not restore the debugger state",  # of a notebook that was closed
)
OUTPUTS = [".jp-Notebook .jp-Cell-outputArea"]


class Desk:
    """A page with JupyterLab: one notebook after the other is opened in it, as a learner does.

    ``window.late`` delays its messages to the kernel and back by so many milliseconds.
    """

    def __init__(self, page, address, folder):
        self.page, self.address, self.folder = page, address, folder
        page.set_default_timeout(30_000)
        page.add_init_script(LATE)

    def open(self, name, notebook=None):
        """Open ``name``, once ``notebook`` is written there; the one before is closed, and its kernel."""
        self.page.bring_to_front()  # one behind another is drawn once in a second
        if notebook is not None:
            nbformat.write(notebook, self.folder / name)
        if self.page.url.startswith(self.address):
            set_theme(self.page, "Light")
            self.page.evaluate(OPEN, name)
            self.page.wait_for_function(KERNEL_READY, polling=POLLING, timeout=120_000)
        else:
            open_notebook(self.page, self.address, name)
        return self.page

    def show(self, name, *cells):
        """Open a notebook of these cells, code or other, and run it."""
        self.open(name, new_notebook(
            cells=[new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}))
        assert run_all(self.page) == []
        return self.page


def find_chromium():
    """Path of the browser, or None."""
    return os.environ.get("QLAB_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@contextlib.contextmanager
def jupyterlab(root):
    """Serve the folder ``root``; gives the server's address."""
    with tempfile.TemporaryDirectory(prefix="qlab_lab_", ignore_cleanup_errors=True) as home:
        config = Path(home, "config")
        (config / "labconfig").mkdir(parents=True)
        (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
        environment = dict(
            os.environ, JUPYTER_CONFIG_DIR=str(config), JUPYTER_RUNTIME_DIR=f"{home}/run",
            JUPYTERLAB_SETTINGS_DIR=f"{home}/settings", JUPYTERLAB_WORKSPACES_DIR=f"{home}/workspaces",
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "jupyterlab", *LAB_FLAGS, f"--ServerApp.port={port}",
                   f"--ServerApp.root_dir={root}"]
        with open(f"{home}/log", "w") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_for(server, address, Path(home, "log"))
            yield address
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)


@contextlib.contextmanager
def chromium(width=1280, height=800):
    """A new page in a browser with an empty profile."""
    with tempfile.TemporaryDirectory(prefix="qlab_profile_", ignore_cleanup_errors=True) as profile, \
            sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=find_chromium(), headless=True, args=CHROMIUM_FLAGS,
            viewport={"width": width, "height": height},
        )
        yield context.pages[0]
        context.close()


def open_notebook(page, address, name):
    """Open ``name`` from the served folder and wait for its kernel."""
    page.goto(f"{address}/doc/workspaces/{Path(name).stem}/tree/{name}?reset&token={TOKEN}",
              wait_until="domcontentloaded")
    page.wait_for_function(KERNEL_READY, polling=POLLING, timeout=120_000)


def run_all(page, timeout=400):
    """Run every cell; gives the errors that cells ended with."""
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(ALL_RUN, polling=POLLING, timeout=timeout * 1000)
    return page.evaluate(CELL_ERRORS)


def set_theme(page, theme):
    """Change JupyterLab's theme to "Light" or "Dark"."""
    before = page.evaluate(BACKGROUND)
    name = f"JupyterLab {theme}"
    if page.evaluate("() => document.body.dataset.jpThemeName") != name:
        page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        page.wait_for_function(f"before => ({BACKGROUND})() !== before", arg=before)
        page.locator("#jupyterlab-splash").wait_for(state="detached")  # it covers the page, fading, for 0.2 s more


def violations(page, rules=None, text=".jp-MarkdownOutput"):
    """What axe-core finds in the outputs and the rendered ``text`` of the notebook, if it is serious or critical.

    By all of its rules, or those named in ``rules``. One text for each element: the rule, its HTML, where, and why.
    """
    size, style = page.viewport_size, page.add_style_tag(content=ONLY_OUTPUTS)
    total = page.locator(".jp-WindowedPanel-outer:visible").evaluate("pane => pane.scrollHeight")
    page.set_viewport_size({**size, "height": total + 400})  # axe judges the contrast of what is in the window
    try:
        options = {"resultTypes": ["violations"], "rules": {rule: {"enabled": False} for rule in NOT_OURS}}
        options |= {"runOnly": rules} if rules else {}
        found = Axe().run(page, context={"include": [OUTPUTS, [f".jp-Notebook {text}"]]}, options=options).response
    finally:
        style.evaluate("style => style.remove()")
        page.set_viewport_size(size)
    assert any(rule["id"] == "color-contrast" and rule["nodes"] for rule in found["passes"]), "axe has seen no text"
    return [f"{rule['id']}: {node['html'][:200]}\n    {node['target']}\n    {node['failureSummary']}"
            for rule in found["violations"] if rule["impact"] in ("serious", "critical") for node in rule["nodes"]]


def errors_of_the_console(page):
    """What the browser's console says of errors, from now on."""
    messages = []

    def hear(text):
        if not any(known in text for known in HARMLESS):
            messages.append(text)

    page.on("pageerror", lambda error: hear(str(error)))
    page.on("console", lambda message: hear(f"{message.text} {message.location.get('url', '')}")
            if message.type == "error" else None)
    return messages


def ask_kernel(page, code):
    """Execute ``code`` in the notebook's kernel, outside of its cells; gives what it printed."""
    return page.evaluate(
        """async code => { const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel
             .requestExecute({code, store_history: false});
           let said = '';
           future.onIOPub = ({header, content}) => {
             if (header.msg_type === 'stream') said += content.text;
             if (header.msg_type === 'error') said += `${content.ename}: ${content.evalue}`; };
           await future.done; return said; }""",
        code,
    )


def _wait_for(server, address, log):
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=1).read()
            return
        time.sleep(0.05)
    raise TimeoutError(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")
