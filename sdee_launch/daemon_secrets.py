"""The daemon's knowledge of the host's secrets: scanned, watched, and hidden from who lives."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time

import trio

from sdee_launch import config, mask_live, mask_watch
from sdee_launch.accounts import account_of
from sdee_launch.instances import Registry
from sdee_launch.masks import Masks

log = logging.getLogger("sdeed")
#: Seconds that the name service has to tell a user's groups.
_LOOK_UP_SECONDS = 10.0
#: Seconds between two whole scans for the sake of the watch.
_PAUSE = 5.0


class Secrets:
    """`ready` is set when the first scan is in force."""

    def __init__(self, masks: Masks, registry: Registry, seconds: float) -> None:
        self.ready = trio.Event()
        self._masks = masks
        self._registry = registry
        self._seconds = seconds  # between two scans
        self._homes = [os.fsencode(p).strip(b"/") for p in config.site_settings().homes]
        self._watch: mask_watch.Watch | None = None
        self._touched: set[bytes] = set()  # since the scan that is under way began
        self._turn = trio.Lock()

    async def scan_and_again(self) -> None:
        """Scan lower every so often."""
        if self._masks.load(self._seconds):
            self.ready.set()
        while True:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            age = now - self._masks.scanned_at if self._masks.complete else float("inf")
            if age < self._seconds:
                await trio.sleep(self._seconds - age)
                continue
            try:
                await self.scan()
            except (OSError, ValueError, RuntimeError) as error:
                log.error("the scan for secrets failed: %s", error)
                await trio.sleep(min(10.0, self._seconds))

    async def scan(self) -> None:
        """Scan lower now. Raises OSError, ValueError, RuntimeError."""
        started = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._touched.clear()
        done = await trio.run_process(
            [sys.executable, "-I", "-m", "sdee_launch.mask_scan"],
            capture_stdout=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"mask_scan ended with {done.returncode}")
        output = done.stdout.decode("ascii")
        async with self._turn:
            await trio.to_thread.run_sync(self._masks.accept, output, started)
            # The walk may have passed by before these changed.
            await trio.to_thread.run_sync(self._look_again, frozenset(self._touched))
            if self._watch is not None:
                await trio.to_thread.run_sync(self._watch.cover, self._masks.secrets())
            await self._hide_from_live()
        self._masks.prune([record.mask for record in self._registry.of()])
        self.ready.set()

    async def watch(self) -> None:
        """Between two scans: look at what is made or closed where secrets usually are."""
        try:
            watch = mask_watch.Watch()
        except OSError as error:
            log.warning("no watch for secrets, only a scan now and then: %s", error.strerror)
            return
        with contextlib.closing(watch):
            await trio.to_thread.run_sync(watch.cover, self._masks.secrets())
            self._watch = watch
            while True:
                await trio.lowlevel.wait_readable(watch)
                await trio.sleep(mask_watch.SETTLE)
                try:
                    await self._take(watch)
                except (OSError, ValueError, RuntimeError) as error:
                    log.error("the watch for secrets: %s", error)
                    await trio.sleep(1)

    async def _take(self, watch: mask_watch.Watch) -> None:
        async with self._turn:
            changed = await trio.to_thread.run_sync(watch.changed)
            if changed is not None:
                self._touched |= changed
                if await trio.to_thread.run_sync(self._look_again, frozenset(changed)):
                    await self._hide_from_live()
                return
        # More has changed than can be looked at one by one; whoever makes it isn't done yet.
        await self.scan()
        await trio.sleep(_PAUSE)

    def _look_again(self, changed: frozenset[bytes]) -> bool:
        if self._watch is not None:
            for path in changed:  # marks first: nothing is made in a new directory unseen
                self._watch.mark_below(path)
        return self._masks.update(changed, self._homes)

    async def _hide_from_live(self) -> None:
        """What is secret now is so in the instances that live, too."""
        for record in self._registry.of():
            try:
                with trio.fail_after(_LOOK_UP_SECONDS):
                    owner = await trio.to_thread.run_sync(
                        account_of, record.uid, abandon_on_cancel=True
                    )
                gids = (owner.gid, *owner.groups)
                if await trio.to_thread.run_sync(mask_live.hide, self._masks, record, gids):
                    log.info("more is hidden in %s of uid %d", record.environment, record.uid)
            except (OSError, RuntimeError, KeyError, trio.TooSlowError) as error:
                log.error("hide from %s of uid %d: %s", record.environment, record.uid, error)
