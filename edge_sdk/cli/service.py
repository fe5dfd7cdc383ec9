"""`edge-sdk service install|remove|status|logs` and `edge-sdk doctor`."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import msgspec

from edge_sdk.agent.settings import DEFAULT_CONFIG, default_config, parse_config
from edge_sdk.agent.setup import default_keys
from edge_sdk.cli import doctor, systemd_unit
from edge_sdk.cli.flags import MOST, Only, add_command, path_flag, print_json, whole_flag
from edge_sdk.cli.systemd_unit import ROOT
from edge_sdk.errors import ConfigError, UsageError
from edge_sdk.helpers.text import mebibytes

log = logging.getLogger(__name__)
STATUS = (
    "LoadState,UnitFileState,ActiveState,SubState,StateChangeTimestamp,StatusText,"
    "MemoryCurrent,MemoryMax,NRestarts,Result,ExecMainStatus"
)


def add_service_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "service",
        "take part as a systemd service",
        "sudo edge-sdk service install --start",
        "edge-sdk service logs --follow",
    )
    actions = parser.add_subparsers(required=True, metavar="install|remove|status|logs")

    install = add_command(
        actions,
        "install",
        "write unit and config, enable; again: upgrade",
        "sudo edge-sdk service install --start",
    )
    install.add_argument(
        "--config", type=path_flag, default=DEFAULT_CONFIG, help="default %(default)s"
    )
    install.add_argument("--start", action="store_true", help="start it now, or start it anew")
    install.add_argument("--dry-run", action="store_true", help="print the unit, change nothing")
    install.only["--start"] = Only("--dry-run", (False,))
    install.set_defaults(run=run_install)

    remove = add_command(
        actions,
        "remove",
        "stop, disable, delete the unit; keeps config, keys",
        "sudo edge-sdk service remove",
    )
    remove.add_argument("--purge", action="store_true", help="delete config, keys and cache too")
    remove.set_defaults(run=run_remove)
    for action in (install, remove):
        action.add_argument(
            "--root",
            type=path_flag,
            default=ROOT,
            metavar="DIR",
            help="a system's folder instead of this system; systemctl is not called",
        )

    status = add_command(
        actions, "status", "what it does, memory, restarts", "edge-sdk service status"
    )
    status.set_defaults(run=run_status)
    logs = add_command(
        actions, "logs", "its lines in the journal", "edge-sdk service logs --lines 200"
    )
    logs.add_argument("--follow", "-f", action="store_true", help="go on with new ones")
    logs.add_argument(
        "--lines", "-n", type=whole_flag(0, MOST), default=50, help="the last so many"
    )
    logs.set_defaults(run=run_logs)


def add_doctor_command(commands: Any) -> None:
    parser = add_command(
        commands, "doctor", "check all that a device needs, say what to do", "edge-sdk doctor"
    )
    parser.add_argument(
        "--config", type=path_flag, metavar="FILE", help="default the one join wrote"
    )
    parser.add_argument("--json", action="store_true", help="one JSON array")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Exit status 1 if a check fails; warnings are not failures."""
    config = args.config or default_config(default_keys)
    is_there = args.config or config.exists()
    findings = doctor.examine(config.absolute() if is_there else None, default_keys())
    done = doctor.report(findings, (lambda line: None) if args.json else print)
    if args.json:
        print_json(msgspec.to_builtins(done))
    return int(any(finding.outcome == "fail" for finding in done))


def run_install(args: argparse.Namespace) -> int:
    root, config = args.root.absolute(), args.config.absolute()
    if args.start and root != ROOT:
        raise UsageError("--start is for this system, not for --root")
    _check_can_install(is_real=root == ROOT and not args.dry_run)
    if args.dry_run and not systemd_unit.under(root, config).exists():
        settings, is_new = parse_config("", str(config)), False
    else:
        settings, is_new = systemd_unit.ensure_config(root, config)
    systemd_unit.check_visible(settings, config)
    unit = systemd_unit.unit_text(
        settings,
        systemd_unit.own_command(root),
        config,
        systemd_version=systemd_unit.systemd_version() if root == ROOT else 0,
        groups=systemd_unit.existing_groups(root),
    )
    if args.dry_run:
        print(unit, end="")
        return 0
    systemd_unit.install(root, unit)
    print(f"wrote {systemd_unit.under(root, systemd_unit.UNIT)}")
    if is_new:
        print(f"wrote {systemd_unit.under(root, config)}")
    lacking = [key for key in ("coordinator", "data") if getattr(settings, key) is None]
    if lacking and args.start:
        raise ConfigError(f"{config} does not set {' and '.join(lacking)}; nothing was started")
    if lacking:
        print(f"next: set {' and '.join(lacking)} in {config}")
    elif args.start:
        _start()
    return 0


def _check_can_install(*, is_real: bool) -> None:
    """Raises ConfigError where the service cannot run. Not is_real, for another root or a dry run,
    only what is wrong with this installation is looked at, for a warning."""
    if is_real:
        systemd_unit.check_running_systemd()
        check_root("service install")
    if hidden := systemd_unit.hidden_program():
        if is_real:
            raise ConfigError(hidden)
        log.warning("%s", hidden)


def _start() -> None:
    """Start the service anew; it is ready once it has read its data."""
    try:
        systemd_unit.systemctl("restart", systemd_unit.NAME)
    except ConfigError as error:
        raise ConfigError("the service did not start; see edge-sdk service logs") from error
    print("started")


def run_remove(args: argparse.Namespace) -> int:
    root = args.root.absolute()
    if root == ROOT:
        systemd_unit.check_running_systemd()
        check_root("service remove")
    for path in systemd_unit.remove(root, with_state=args.purge):
        print(f"removed {path}")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Exit status 0 while the service is active, else 1."""
    systemd_unit.check_running_systemd()
    found = systemd_unit.shown(STATUS)
    if found.get("LoadState") == "not-found":
        raise ConfigError("the service is not installed; run sudo edge-sdk service install")
    print(describe(found))
    return 0 if found["ActiveState"] == "active" else 1


def describe(found: dict[str, str]) -> str:
    """The properties that `systemctl show` gave, in four lines for a person."""
    used, most = (_size(found.get(name, "")) for name in ("MemoryCurrent", "MemoryMax"))
    since = found.get("StateChangeTimestamp") or "boot"
    result = found.get("Result", "success")
    status = found.get("ExecMainStatus", "0")
    ended = "" if result == "success" else f" (status {status}; see edge-sdk service logs)"
    return (
        f"service   {found['ActiveState']} ({found.get('SubState', '')}) since {since}, "
        f"{found.get('UnitFileState') or 'not enabled'}\n"
        f"doing     {found.get('StatusText') or '-'}\n"
        f"memory    {used} of at most {most}\n"
        f"restarts  {found.get('NRestarts', '0')}, last result: {result}{ended}"
    )


def _size(number: str) -> str:
    """A size that systemd gives, in MiB; "-" for its "[not set]" and "infinity"."""
    return mebibytes(int(number)) if number.isdecimal() and int(number) < 2**60 else "-"


def run_logs(args: argparse.Namespace) -> int:
    """This process becomes journalctl."""
    systemd_unit.check_running_systemd()
    command = ["journalctl", "--unit", systemd_unit.NAME, "--lines", str(args.lines)]
    command += ["--follow"] if args.follow else ["--no-pager"]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ConfigError(f"journalctl cannot be run: {error}") from error


def check_root(action: str) -> None:
    if os.geteuid() != 0:
        command = " ".join(systemd_unit.own_command())  # sudo has a PATH of its own
        raise ConfigError(f"{action} needs root; run sudo {command} {action}")
