"""Self-test: the box as a caller of its own receivers, with C-ECHO and with an invented image that is delivered.

It calls as ``RELAY-CHECK``, which a receiver takes when its ``allow`` has that title; the route whose ``calling_ae``
has it says to which project and destination the image goes.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from relay_agent import dicom, dimse, scu
from relay_agent.config import Config, Receiver
from relay_agent.destinations import Finding
from relay_agent.ledger import Ledger, State
from relay_agent.negotiate import CALLING_AE_UNKNOWN, VERIFICATION

CALLING_AE = "RELAY-CHECK"
_PATIENCE = 10.0  # seconds for each answer


class Failed(Exception):
    """The self-test came to no good end; the message says where it stopped and why."""


def echo(receiver: Receiver) -> Finding:
    """Whether a receiver that should be running answers a C-ECHO from this box."""
    what = f"port {receiver.port} on {receiver.address}: {receiver.ae_title}"
    if receiver.tls and receiver.tls.client_ca:
        return Finding(True, f"{what} is in use (it asks for a certificate, and this box has none)")
    try:
        with _call(receiver, VERIFICATION) as association:
            status = association.ask(VERIFICATION, dimse.request(dimse.C_ECHO_RQ, 1, VERIFICATION)).status
    except scu.Rejected as rejected:
        return Finding(rejected.reason == CALLING_AE_UNKNOWN, f"{what} answers, and rejects this box as a caller "
                       f"({'/'.join(map(str, rejected.reason))})", "another program has the port, or it is crowded")
    except (scu.HungUp, scu.Broken, OSError):
        return Finding(False, f"{what} is in use, and no receiver answers there",
                       "see whether another program has the port: ss -tlnp; otherwise restart the service")
    return Finding(status == 0, f"{what} answers C-ECHO", "see the service's log")


def deliver(config: Config, ledger: Ledger, patience: float) -> str:
    """Send an invented image to this box and wait until its arrival at the test route's destinations is proved.

    Where it is now; :class:`Failed` when there is no route for it, or after ``patience`` seconds beyond the time that
    makes a session complete.
    """
    if not any(CALLING_AE in route.calling_ae for route in config.route):
        raise Failed(f'no route has calling_ae = ["{CALLING_AE}"]: add one that leads to a project for tests')
    receiver = next((r for r in config.receiver if r.port and not (r.tls and r.tls.client_ca)), None)
    if receiver is None:
        raise Failed("every receiver asks for a certificate, and this box has none")
    image = _image(config.name)
    try:
        with _call(receiver, MRImageStorage) as association:
            request = dimse.request(dimse.C_STORE_RQ, 1, MRImageStorage, image.SOPInstanceUID)
            status = association.ask(MRImageStorage, request, [dicom.encode(image, ExplicitVRLittleEndian)]).status
    except scu.Rejected:
        raise Failed(f"{receiver.ae_title} does not take {CALLING_AE}: add it to allow, with this box's own address"
                     ) from None
    except (scu.HungUp, scu.Broken, OSError) as error:
        raise Failed(f"{receiver.ae_title} did not take the image ({type(error).__name__}): is the service running?"
                     ) from None
    if status:
        raise Failed(f"{receiver.ae_title} answered C-STORE with {status:04X}: see the service's log")
    return _wait(ledger, image.StudyInstanceUID, time.monotonic() + config.stage.quiet + patience)


def _wait(ledger: Ledger, study: str, deadline: float) -> str:
    where = "it is not in the ledger"
    while time.monotonic() < deadline:
        row = ledger.one("SELECT id, state, reason FROM shipment WHERE study_uid = ?", study)
        if row is not None:
            where = f"shipment {row['id']} is {row['state']}"
            if row["state"] == State.DELIVERED:
                places = ledger.all("SELECT destination, location FROM delivery WHERE shipment = ?", row["id"])
                return "; ".join(f"{place['destination']}: {place['location']}" for place in places)
            if row["state"] in (State.HELD, State.REVIEW, State.REJECTED):
                raise Failed(f"{where}: {row['reason']}")
            for delivery in ledger.all("SELECT destination, state, error FROM delivery WHERE shipment = ? AND error IS "
                                       "NOT NULL", row["id"]):
                where = f"shipment {row['id']} is {delivery['state']} at {delivery['destination']}: {delivery['error']}"
                if delivery["state"] == "stopped":
                    raise Failed(where)
        time.sleep(0.2)
    raise Failed(f"the invented image was not delivered in time; {where}")


def _call(receiver: Receiver, sop_class: str, syntaxes: Sequence[str] = (ExplicitVRLittleEndian,)) -> scu.Association:
    context = None
    if receiver.tls:  # its certificate is its own anchor: it is ourselves that we call
        context = ssl.create_default_context(cafile=str(receiver.tls.certificate))
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(receiver.address, receiver.address)  # noqa: S104 - where it listens
    return scu.Association(scu.connect(host, receiver.port, _PATIENCE, context), receiver.ae_title, CALLING_AE,
                           [(sop_class, syntaxes)], negotiation=_PATIENCE, answer=60.0)


def _image(box: str) -> Dataset:
    """An MR image of 8 × 8 black pixels that says what it is; the session is named after the box and the moment."""
    session = f"{box}-check-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}".replace(".", "_")
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.Modality, data.SeriesNumber, data.InstanceNumber = "MR", 1, 1
    data.PatientName = data.PatientID = session
    data.StudyDate = time.strftime("%Y%m%d", time.gmtime())
    data.StudyDescription = data.SeriesDescription = "Self-test of a relay"
    data.PatientComments = f"Subject:{session} Session:{session} AA:true"
    data.Rows = data.Columns = 8
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelData = 1, "MONOCHROME2", bytes(128)
    return data
