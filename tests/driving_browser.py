"""A headless Chromium, where one is installed, driven over a pipe: pages opened, scripts evaluated, errors heard."""

import fcntl
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab; `heard` are the events of its pages."""

    def __init__(self, requests, answers):
        self._requests, self._answers, self._count, self._session = requests, answers, 0, {}
        self.heard = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.heard.append(answer)

    def _read(self):
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, path):
        """Open a file and wait until it is loaded."""
        self.heard.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.heard):
            self.heard.append(self._read())

    def value(self, script):
        """What an expression of JavaScript gives."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def events(self, *methods):
        return [event["params"] for event in self.heard if event.get("method") in methods]


@contextmanager
def browser(folder):
    """A browser whose profile lies in a folder."""
    inward, requests = os.pipe()
    answers, outward = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 30) for end in (inward, outward)]
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--window-size=1300,900"]

    def connect():  # Chromium reads from 3 and writes to 4
        for end, number in zip(theirs, (3, 4), strict=True):
            os.dup2(end, number)

    with (
        open(requests, "wb") as writing,
        open(answers, "rb", buffering=2**20) as reading,
        subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        for end in (inward, outward, *theirs):
            os.close(end)
        try:
            yield Browser(writing, reading)
        finally:
            process.kill()
