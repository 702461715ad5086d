"""`make demo`: a study leaves a scanner over DICOM, travels over HTTPS and is proved to have arrived."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pydicom
import trustme
from pydicom.dataset import Dataset
from rich.progress import Progress

from relay_agent import report
from relay_agent.dicom import NotDICOM
from relay_agent.header import read_header
from tests import data
from tests.central import Central
from tests.harness import PROJECT, SECRET, Agent, send, wait_for, xnat

console = report.console()

SERIES, SLICES = 4, 80


def samples() -> Iterator[Dataset]:
    """pydicom's own sample files that are whole instances with somebody to assign them to."""
    seen: set[str] = set()
    warnings.filterwarnings("ignore", module="pydicom")  # some are odd on purpose: no news to a newcomer
    for path in sorted(Path(pydicom.__file__).parent.glob("data/test_files/*.dcm")):
        try:
            header = read_header(path, ("00100010", "00100020"))
            image = pydicom.dcmread(path)
        except (NotDICOM, pydicom.errors.InvalidDicomError):
            continue
        whole = "SOPClassUID" in image and "TransferSyntaxUID" in image.file_meta
        if whole and header.get("00100010") and header.get("00100020") and image.SOPInstanceUID not in seen:
            seen.add(image.SOPInstanceUID)
            yield image


def main() -> int:
    """Run the demonstration; the exit status."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relay-demo-") as name:
        folder = Path(name)
        ca = trustme.CA()
        certificate = ca.issue_cert("localhost", "127.0.0.1")
        ca.cert_pem.write_to_path(folder / "ca.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "server.pem")
        certificate.private_key_pem.write_to_path(folder / "server.key")
        user, _, password = SECRET.partition(":")
        with Central(folder / "central", projects=["P1", "SAMPLES"], users={user: password},
                     tls=(folder / "server.pem", folder / "server.key")) as central:
            console.print(f"[bold]1.[/] the stand-in for the central XNAT listens on {central.url}")
            route = ('[[route]]\nname = "samples"\nassign_project = "SAMPLES"\ncalling_ae = ["CDROM"]\n'
                     'destinations = ["central"]')
            agent = Agent(folder / "box", xnat(central.url, folder / "box", folder / "ca.pem").replace(
                "[[route]]", route + "\n[[route]]", 1))
            agent.start()
            try:
                return _tour(agent, central, start)
            finally:
                agent.stop()


def _tour(agent: Agent, central: Central, start: float) -> int:
    console.print(f"[bold]2.[/] the relay agent receives as RELAY on port {agent.port}")
    study = list(data.study(SERIES, SLICES, size=(128, 128)))
    others = list(samples())
    count = len(study) + len(others)
    with Progress(console=console) as progress:
        bar = progress.add_task("3. C-STORE from the scanner ", total=count)
        for images, calling in ((study, "SCANNER"), (others, "CDROM")):
            for position in range(0, len(images), 40):
                statuses = send(agent.port, images[position:position + 40], calling=calling)
                if any(statuses):
                    console.print(f"[red]the agent did not take an instance[/]\n{agent.log[-3000:]}")
                    return 1
                progress.advance(bar, len(statuses))
        bar = progress.add_task("4. delivered and verified   ", total=count)

        def delivered() -> int:
            done = agent.status()["balance"]["delivered"]
            progress.update(bar, completed=done)
            return int(done == count)

        try:
            wait_for(delivered)
        except AssertionError:
            console.print(f"[red]not everything was delivered[/]\n{agent.cli('list').stdout}{agent.log[-2000:]}")
            return 1
    first = agent.json("list")[-1]["shipment"]
    for command in (["status"], ["show", str(first)], ["receipt", str(first)], ["receipt", "--verify"]):
        console.print(f"\n[bold]$ relay-agent {' '.join(command)}[/]")
        console.print(agent.cli(*command).stdout.rstrip(), markup=False)
    there = central.archive_instances("P1", "S1_MR1")
    same = sum(str(image.SOPInstanceUID) in there for image in study)
    console.print(f"\nThe central archive holds {same} of the study's {len(study)} instances; looked up on its disk.")
    console.print(f"""
To go on by hand, in {PROJECT}:
  .venv/bin/relay-agent example-config > config.toml     a commented configuration; edit it
  .venv/bin/relay-agent check --config config.toml       does everything answer?
  .venv/bin/relay-agent run --config config.toml         receive and deliver
  .venv/bin/relay-agent --help                           everything else
  .venv/bin/python -m tests.central --help               the stand-in XNAT, to try against
""")
    receipts = [r for shipment in agent.json("list") for r in agent.json("receipt", str(shipment["shipment"]))]
    proved = {instance["sop_instance"] for receipt in receipts for instance in receipt["instances"]}
    console.print(f"took {time.monotonic() - start:.0f} s")
    print(f"delivered and verified: {len(proved)} of {count} instances")
    return 0 if len(proved) == count and same == len(study) else 1


if __name__ == "__main__":
    sys.exit(main())
