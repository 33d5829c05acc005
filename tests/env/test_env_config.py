"""Settings: the site's and the user's, and what is wrong in them refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdee_launch import config, privileges
from sdee_launch.config import ConfigError, Settings, apply


def test_nothing_said_is_the_default(tmp_path: Path) -> None:
    assert config.site_settings(str(tmp_path / "no-such-file")) == Settings()


def test_values_reach_their_place() -> None:
    text = """
    [environments]
    engine = "fuse"
    store = "/var/lib/sdee/{user}"
    [instance]
    shared = ["/scratch"]
    namespaces = ["uts"]
    [privileges]
    no_new_privs = true
    [login]
    on_failure = "deny"
    """
    made = apply(Settings(), text, "file")
    assert made.engine == "fuse" and made.store == "/var/lib/sdee/{user}"
    assert made.shared == ("/scratch",) and made.namespaces == ("uts",)
    assert made.guard().no_new_privs
    assert made.section("login") == {"on_failure": "deny"}
    assert made.section("deploy") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[environment]\n", "[environment] is no section"),
        ("[environments]\nengines = 'x'\n", "environments.engines is no setting"),
        ("[environments]\nengine = 'diesel'\n", "environments.engine"),
        ("[environments]\nengine = 5\n", "environments.engine is no str"),
        ("[environments]\nstore = '{nobody}'\n", "nobody"),
        ("[instance]\nshared = 'x'\n", "instance.shared is no list"),
        ("[instance]\nnamespaces = ['net']\n", "net"),
        ("[privileges]\ncapabilities = ['chown', 'fly']\n", "fly is no capability"),
        ("[privileges]\nallowed_calls = ['open']\n", "open is no call"),
        ("[login]\nshel = 'x'\n", "login.shel is no setting"),
        ("[deploy]\ncache_limit = 'lots'\n", "file: deploy.cache_limit: 'lots' is no size; 500M"),
        ("[deploy]\nwarn_size = '-1G'\n", "file: deploy.warn_size: '-1G' is no size"),
        ("[deploy]\nwarn_size = 5\n", "deploy.warn_size is no str"),
        ("instance = 5\n", "instance is a section"),
        ("[instance\n", "file:"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply(Settings(), text, "file")
    assert said in str(raised.value)


def test_sizes_are_sizes() -> None:
    text = "[deploy]\ncache_limit = ''\nwarn_size = '1.5T'\n"
    assert apply(Settings(), text, "file").section("deploy")["warn_size"] == "1.5T"
    assert [config.parse_size(x) for x in ("7", "2K", "1.5GiB")] == [7, 2000, 1500000000]


def test_users_set_what_they_may(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    file = tmp_path / ".config/sdee/sdee.toml"
    file.parent.mkdir(parents=True)
    file.write_text("[environments]\ndefault = 'mine'\n")
    assert config.load(str(tmp_path), str(site)).environment == "mine"
    file.write_text("[privileges]\nno_new_privs = false\n")
    with pytest.raises(ConfigError, match=r"privileges\.no_new_privs is not for users"):
        config.load(str(tmp_path), str(site))
    site.write_text("[users]\nmay = ['environments.engine']\n")
    file.write_text("[environments]\ndefault = 'mine'\n")
    with pytest.raises(ConfigError, match="not for users"):
        config.load(str(tmp_path), str(site))


def test_dropped_capabilities_cannot_be_had() -> None:
    everything = [f"CAP_{name.upper()}" for name in privileges.CAPABILITIES]
    made = apply(Settings(), f"[privileges]\ncapabilities = {everything}\n", "file")
    mask = made.guard().capabilities
    for name in ("sys_admin", "sys_module", "sys_boot", "sys_rawio", "bpf"):
        assert not mask >> privileges.CAPABILITIES.index(name) & 1
    assert mask >> privileges.CAPABILITIES.index("chown") & 1
    assert apply(Settings(), "[privileges]\ncapabilities = []\n", "file").guard().capabilities == 0
