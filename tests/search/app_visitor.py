"""A visitor of the page, over HTTP as a browser would be, and the page's server in a process of its own."""

import contextlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from types import SimpleNamespace

import httpx

DEFAULTS = {"sentence": "", "where": "", "count": 20, "cut": False, "marks": "[]"}


@contextlib.contextmanager
def running(index, model, folder, *arguments):
    """`icone app` on a free port; its temporary files lie in `folder`."""
    folder.mkdir()
    command = [sys.executable, "-m", "icone_hf", "app", index, "--model", model, "--port", "0", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        line = process.stdout.readline()
        assert " shows " in line, folder.with_suffix(".log").read_text()
        yield SimpleNamespace(url=line.split()[0], pid=process.pid, folder=folder, log=folder.with_suffix(".log"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Visitor:
    """Speak Gradio's protocol; keep what the page's components hold."""

    def __init__(self, url):
        self.client = httpx.Client(base_url=url, timeout=60)
        self.session = uuid.uuid4().hex
        self.config = self.client.get("/config").json()
        self.names = {part["id"]: part["props"].get("elem_id") for part in self.config["components"]}
        self.parts = {**DEFAULTS, "chips": "", "results": "", "details": ""}

    def close(self):
        self.client.close()

    def post(self, target, event, **said):
        """Send an event; return the server's answer, and what the event sets."""
        found = [one for one in self.config["dependencies"] if [self._id(target), event] in one["targets"]]
        (dependency,) = found
        body = {"fn_index": dependency["id"], "session_hash": self.session, "event_data": said or None}
        body |= {"trigger_id": self._id(target), "data": [self.parts[self.names[one]] for one in dependency["inputs"]]}
        return self.client.post("/gradio_api/queue/join", json=body), [self.names[i] for i in dependency["outputs"]]

    def do(self, target, event, said=None, **parts):
        """Fill in parts of the page, do something, and wait for what it shows."""
        self.parts |= parts
        answer, outputs = self.post(target, event, **(said or {}))
        answer.raise_for_status()
        told = self._wait(answer.json()["event_id"])
        if told["success"]:
            self.parts |= dict(zip(outputs, told["output"]["data"], strict=True))
        return told["success"]

    def search(self, sentence="", **parts):
        assert self.do("sentence", "submit", sentence=sentence, **parts)
        return self.ids()

    def show(self, one):
        assert self.do("results", "select", {"id": one})
        return self.parts["details"]

    def mark(self, kind, one):
        assert self.do("details", "like", {"kind": kind, "id": one})
        return self.ids()

    def upload(self, content):
        return self.client.post("/upload", content=content)

    def ids(self):
        return re.findall(r'<button type="button" data-id="(\w+)"', self.parts["results"])

    def scores(self):
        return [float(one) for one in re.findall(r"<b>(-?[\d.]+)</b>", self.parts["results"])]

    def message(self):
        return html.unescape(re.search(r'<p class="message[^>]*>(.*?)</p>', self.parts["results"])[1])

    def _id(self, name):
        return next(one for one, of in self.names.items() if of == name)

    def _wait(self, event):
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if told.get("event_id") == event and told["msg"] == "process_completed":
                    return told
        raise AssertionError("The server closed the connection.")
