"""In a keeper: one request to make an instance, put as sdee_launch.site wants it.

The message has `owner` (an Account's fields), `environment`, `engine`, `binds`, `masks` (the mask
tree for each engine) and, for a job, its number in `job`, the generations below its upper in
`lowers` and the directory of its upper in `place`.
"""

from __future__ import annotations

from typing import Any

from sdee_launch import config, site
from sdee_launch.accounts import Account
from sdee_launch.environments import Denied
from sdee_launch.plan import PlanProblem
from sdee_launch.protocol import Refused

Answer = tuple[dict[str, object], list[int]]
#: Why an instance can't be made, in words for the user.
PROBLEMS = (
    site.EngineProblem,
    site.EnvironmentProblem,
    site.InstanceProblem,
    PlanProblem,
    config.ConfigError,
)


def make(message: dict[str, Any], fds: list[int]) -> Answer:
    """Make an instance: its init, engine, servers, and what joining it takes.

    Raises OSError, Refused.
    """
    owner = dict(message["owner"])
    account = Account(**{**owner, "groups": tuple(owner["groups"])})
    name = str(message["environment"])
    try:
        # The user's own file is read with the user's rights: it may be a link to anything.
        try:
            with site.as_user(account):
                settings = config.load(home=account.home)
        except config.Unreadable:
            # A home that lets in nobody but its user's own processes, as FUSE's. They need a store.
            site.prepare_store(account, config.site_settings())
            raise
        job = None
        environment = None
        if message.get("job"):
            lowers = message.get("lowers") or []
            job = site.JobLayers(tuple(str(x) for x in lowers), str(message["place"]))
        else:
            environment = site.open_environment(account, name, settings)
        try:
            made = site.make_instance(
                account,
                environment,
                str(message.get("engine") or "auto"),
                tuple(message.get("binds") or ()),
                message.get("masks"),
                settings,
                name=name,
                job=job,
                lasting=job is not None,
            )
        finally:
            if environment is not None:
                environment.close()
    except (Denied, config.Unreadable) as error:
        raise Refused(str(error), "rootless") from None
    except PROBLEMS as error:
        raise Refused(str(error)) from None
    return {
        "init": made.init,
        "engine": made.engine,
        "servers": list(made.servers),
        "join": made.join,
    }, []
