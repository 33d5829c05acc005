"""The command line of `sdeefs`: its parser, its help, and its exit codes.

Each command's room is imported when it runs, and only its part of the command line is made:
`--help`, usage errors and `status` stay quick.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

OK, FAILURE, USAGE = 0, 1, 2

_DESCRIPTION = """\
A union filesystem in user space with overlayfs's formats: MERGED shows UPPER on top of LOWER, and
every change goes to UPPER. An upper written by sdeefs mounts under the kernel's overlayfs with the
same result, and the reverse.
"""
_EPILOG = """\
exit status: 0 success, 1 failure (one line on standard error), 2 wrong usage.

files:
  /run/sdeefs, $XDG_RUNTIME_DIR/sdeefs   one socket, record and (when something is wrong) log
                                         for each server
examples:
  sdeefs mount changes /usr view          see /usr in view; what is changed there lands in changes
  sdeefs diff changes /usr                what was changed
  sdeefs umount view
  mount -t fuse.sdeefs sdeefs /view -o lowerdir=/usr,upperdir=/u,workdir=/w,allow_other
"""
_MOUNT = """\
Mount UPPER over LOWER at MERGED and return when it is usable. The server runs on in the background
and ends when MERGED is unmounted, by whatever means. Errors before that are printed here.

Without UPPER and LOWER they are taken from -o: lowerdir alone mounts read-only.
"""
_OPTIONS = r"""
options (-o NAME[=VALUE],...; `\,` is a comma and, in lowerdir, `\:` a colon of a path):
  lowerdir=A[:B...]     the lower directories, the first on top
  upperdir=DIR, workdir=DIR
  userxattr             overlay xattrs as user.overlay.* (default without host privileges)
  volatile              no fsync reaches upper: a crash of the machine may cost it
  redirect_dir=on|follow|nofollow|off   renaming of lower directories (default on)
  index=on|off          hard links of lower stay links after copy-up (default on)
  xino=on|off|auto      inode numbers of several filesystems are made unique (default on)
  metacopy=off, nfs_export=off, verity=off, uuid=...   understood; the other values are refused

  uidmap=, gidmap=INSIDE:OUTSIDE:COUNT[:...]   ids of both layers; upper_uidmap=, upper_gidmap=,
                        lower_uidmap=, lower_gidmap= those of one
  squash_overflow       what belongs to nobody in this user namespace is shown as root's
  override_stat=on|off|auto   ownership in user.containers.override_stat (default: where needed)
  secrets=UID[:GID...]  what in lower is unreadable for others and for these ids stays unreadable

  transport=auto|ring|device|pyfuse3   how requests reach us (default auto: the fastest there is)
  passthrough=on|off|auto   the kernel reads and writes files itself (Linux >= 6.9, root)
  writeback=on|off|auto     the kernel collects writes (where passthrough isn't taken)
  shortcuts=on|off      the commonest requests are answered in C (default on, where that is built)
  watch=on|off|auto     fanotify tells of changes in lower (else they are seen within a second)
  lower_timeout=, upper_timeout=, timeout=SECONDS   how long the kernel believes what it was told
  whiteouts=auto|chardev|xattr|prefix   how deletions are written
  read_prefixes=on|off  .wh.NAME is a deletion too (default off; on in sdeefs-overlayfs)
  noxattr               behave as on a filesystem without extended attributes
  threads=N, max_directories=N

  allow_other           other users may enter (default for root)
  ro, nosuid, nodev, noexec, noatime, nodiratime, strictatime, nosymfollow and their opposites,
  fsname=, subtype=, x-*, and what fstab adds (defaults, _netdev, nofail, auto, user, ...)
"""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, or the part of one command."""
    import argparse

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "sdeefs", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, summary: str, description: str = "", epilog: str = ""
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description or summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=raw,
            allow_abbrev=False,
        )

    for name, (summary, description, epilog, arguments) in _COMMANDS.items():
        if only in (None, name):
            arguments(command(name, summary, description, epilog))
    return top


def _mount_arguments(mount: argparse.ArgumentParser) -> None:
    mount.add_argument("places", nargs="*", metavar="[UPPER LOWER] MERGED")
    mount.add_argument(
        "--workdir", metavar="DIR", help="on upper's filesystem (default: UPPER.work, made)"
    )
    mount.add_argument(
        "--engine",
        choices=("fuse", "auto", "kernel"),
        default="fuse",
        help="sdeefs itself, the kernel's overlayfs, or that where it works (default: fuse)",
    )
    mount.add_argument("--transport", choices=("auto", "ring", "device", "pyfuse3"))
    mount.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see below"
    )
    mount.add_argument("--source", help="what /proc/mounts shows as the source")
    mount.add_argument("--sloppy", action="store_true", help="ignore unknown options")
    mount.add_argument(
        "-f", "--foreground", action="store_true", help="serve in this process, log to stderr"
    )
    mount.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    mount.add_argument("--log-file", metavar="FILE", help="SIGHUP opens it anew")
    mount.add_argument(
        "-v", "--verbose", action="store_true", help="say which engine serves, and why"
    )


def _umount_arguments(umount: argparse.ArgumentParser) -> None:
    umount.add_argument("merged", metavar="MERGED", nargs="+")
    umount.add_argument("-l", "--lazy", action="store_true", help="even while it is in use")
    umount.add_argument(
        "--force", action="store_true", help="abort the connection of a server that hangs, end it"
    )


def _status_arguments(status: argparse.ArgumentParser) -> None:
    status.add_argument("merged", metavar="MERGED", nargs="?")
    status.add_argument("--json", action="store_true")


def _diff_arguments(diff: argparse.ArgumentParser) -> None:
    diff.add_argument("upper", metavar="UPPER")
    diff.add_argument("lower", metavar="LOWER", nargs="+", help="topmost first")
    diff.add_argument("--prefix-whiteouts", action="store_true", help="read .wh.NAME as deletions")
    diff.add_argument("--no-owners", action="store_true", help="don't compare uids and gids")
    diff.add_argument("--json", action="store_true")


def _fsck_arguments(fsck: argparse.ArgumentParser) -> None:
    fsck.add_argument("upper", metavar="UPPER")
    fsck.add_argument("lower", metavar="LOWER", nargs="*", help="topmost first")
    fsck.add_argument("--workdir", metavar="DIR", help="default: UPPER.work")
    fsck.add_argument("--repair", action="store_true", help="mend what can be mended")
    fsck.add_argument("--json", action="store_true")


def _doctor_arguments(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("upper", metavar="UPPER", nargs="?", help="default: /var/tmp")
    doctor.add_argument("--json", action="store_true")


#: Each command: its line in the help, its description, what follows its options, its arguments.
_COMMANDS = {
    "mount": ("mount UPPER over LOWER at MERGED", _MOUNT, _OPTIONS, _mount_arguments),
    "umount": (
        "unmount MERGED and wait for its server's end",
        "Unmount MERGED and wait until its server has ended, so that UPPER is free again.",
        "",
        _umount_arguments,
    ),
    "status": (
        "list mounts and what their servers do",
        "For each mount: engine, transport, data path, requests served, nodes and descriptors\n"
        "held, memory. A server that doesn't answer is listed as stuck.",
        "",
        _status_arguments,
    ),
    "diff": (
        "list what UPPER changes in LOWER",
        "One line for each difference, mounted or not:\n"
        "  A added   C changed   D deleted   O opaque directory (hides all of lower's)\n"
        "  T of another type   R directory moved from elsewhere in lower",
        "",
        _diff_arguments,
    ),
    "fsck": (
        "check an unmounted UPPER",
        "Look for left-over work files, broken whiteouts and opaque marks, overlay xattrs that\n"
        "have no meaning here, and (with LOWER) redirects that lead nowhere.",
        "",
        _fsck_arguments,
    ),
    "doctor": (
        "try what this kernel, machine and account can do",
        "Try everything that sdeefs can use, with trial mounts on the filesystem of UPPER, and\n"
        "say for each what was tried, whether it works, and how to mend it.",
        "",
        _doctor_arguments,
    ),
}
_ROOMS = {
    "mount": "sdeefs.mount_command",
    "umount": "sdeefs.umount_command",
    "status": "sdeefs.status",
    "diff": "sdeefs.diff_command",
    "fsck": "sdeefs.fsck_command",
    "doctor": "sdeefs.doctor",
}


def _have_streams() -> None:
    """Those that the caller closed are /dev/null: a layer's descriptor must not take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from mount_helpers.standard_output import finish

    _have_streams()
    try:
        return finish("sdeefs", _main(list(sys.argv[1:] if arguments is None else arguments)))
    except SystemExit as ended:  # argparse's, after its help or a usage error
        if not isinstance(ended.code, int):
            raise
        return finish("sdeefs", ended.code)


def _main(words: list[str]) -> int:
    if (
        len(words) >= 2
        and not words[0].startswith("-")
        and words[0] not in _ROOMS
        and "-o" in words
    ):
        # `mount.fuse` of libfuse runs the type's own program as `sdeefs SOURCE MERGED -o …`.
        words = ["mount", "--source", words[0], *words[1:]]
    if words[:1] == ["serve"] and len(words) == 2:
        from sdeefs.public import serve_command  # the process of `sdeefs.public.start_server()`

        return serve_command(int(words[1]))
    if words == ["--version"]:
        import sdeefs

        print(f"sdeefs {sdeefs.__version__}")
        return OK
    parsed = parser(words[0] if words and words[0] in _ROOMS else None).parse_args(words)
    if parsed.version:
        return _main(["--version"])
    if parsed.command is None:
        parser().print_help()
        return USAGE
    import importlib

    try:
        return int(importlib.import_module(_ROOMS[parsed.command]).run(parsed))
    except BrokenPipeError:
        return FAILURE
    except (Exception, KeyboardInterrupt) as error:
        from sdeefs.background import complaint
        from sdeefs.options import UsageError
        from sdeefs.refusals import Refused

        if not isinstance(error, (UsageError, Refused, OSError, KeyboardInterrupt)):
            raise
        status, line = complaint(error)
        print(f"sdeefs {parsed.command}: {line}", file=sys.stderr)
        return status
