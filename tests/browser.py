# Copyright (c) mmscalablevit contributors. All rights reserved.
"""A headless Chromium, driven through its remote protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
OPTIONS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage '
    '--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars'
)


class Browser:
    """One tab: ``open`` a page, ``run`` JavaScript in it, save a picture of it."""

    def __init__(self, profile):
        command_read, self.write_end = os.pipe()
        self.read_end, answer_write = os.pipe()
        # The protocol's pipes are the file descriptors 3 and 4.
        command = f'exec {CHROMIUM} {OPTIONS} --user-data-dir={profile} --remote-debugging-pipe'
        self.process = subprocess.Popen(
            ['bash', '-c', f'{command} 3<&{command_read} 4>&{answer_write}'],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self.number, self.session, self.rest = 0, None, b''
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        found = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self.session = found['sessionId']

    def call(self, method, **params):
        """Send a command and return its result; events in between are dropped."""
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b'\0')
        while True:
            while b'\0' not in self.rest:
                part = os.read(self.read_end, 1 << 20)
                assert part, 'the browser has ended'
                self.rest += part
            answer, self.rest = self.rest.split(b'\0', 1)
            answer = json.loads(answer)
            if answer.get('id') == self.number:
                assert 'error' not in answer, (method, answer)
                return answer['result']

    def run(self, script):
        """The value of an expression, or of the promise that it returns."""
        found = self.call(
            'Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def resize(self, width):
        """Give the window a width in pixels; a narrow one is a phone's."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, url):
        """Show a page and wait until it is loaded."""
        self.call('Page.navigate', url=url)
        self.wait(f"location.href == '{url}' && document.readyState == 'complete'")

    def wait(self, condition, seconds=60):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f'Boolean({condition})'):
            assert time.monotonic() < end, f'waited in vain for {condition}'
            time.sleep(0.05)

    def screenshot(self, path):
        """Save the whole page as PNG."""
        found = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found['data']))

    def close(self):
        """End the browser."""
        self.session = None
        self.call('Browser.close')
        self.process.wait(timeout=30)
        os.close(self.write_end)
        os.close(self.read_end)
