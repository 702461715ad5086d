"""Names of elements as CTP knows them: those of dcm4che 1, about a third of them no DICOM keywords.

CTP reads an unknown name as an absent element, so a script that says ``ReferencedImageSequence`` (there
``RefImageSeq``) tests nothing without a word. Here such a name is refused. dcm4che's names follow rules (``Sequence``
is ``Seq``, ``Referenced`` is ``Ref``) with exceptions; those of the groups that scripts use are listed below, and a
name that neither rule nor list vouches for is refused too: a tag always works.
"""

from __future__ import annotations

import difflib
from functools import lru_cache

from pydicom.datadict import DicomDictionary

_OWN = """
00020017 SendingAET                          00020018 ReceivingAET
00080001 LengthToEndRetired                  00080010 RecognitionCodeRetired
0008002A AcquisitionDatetime                 00080040 DataSetTypeRetired
00080041 DataSetSubtypeRetired               00080042 NuclearMedicineSeriesTypeRetired
00080054 RetrieveAET                         00080055 StationAET
00080094 ReferringPhysicianPhoneNumbers      00080114 CodingSchemeExternal
00081000 NetworkIDRetired                    00081048 PhysicianOfRecord
00081049 PhysicianOfRecordIdentificationSeq  00081060 NameOfPhysicianReadingStudy
00081062 PhysicianReadingStudyIdentificationSeq
00081070 OperatorName                        00081080 AdmittingDiagnosisDescription
00081084 AdmittingDiagnosisCodeSeq           00081111 RefPPSSeq
00082110 LossyImageCompressionRetired        00082130 EventElapsedTime
00082132 EventTimerName                      00082200 TransducerPositionRetired
00082204 TransducerOrientationRetired        00082208 AnatomicStructureRetired
00084000 IdentifyingCommentsRetired          00101002 OtherPatientIDSeq
00101050 InsurancePlanIdentificationRetired  00102110 ContrastAllergies
00102154 PatientPhoneNumbers                 00120060 CoordinatingCenterName
00120063 DeIdentificationMethod              00120064 DeIdentificationMethodCodeSeq
00321021 ScheduledStudyLocationAET           00321030 ReasonforStudy
00380011 IssuerOfAdmissionIDRetired          00380061 IssuerOfServiceEpisodeIDRET
00400001 ScheduledStationAET                 00400002 SPSStartDate
00400003 SPSStartTime                        00400004 SPSEndDate
00400005 SPSEndTime                          00400007 SPSDescription
00400009 SPSID                               00400011 SPSLocation
00400020 SPSStatus                           00400100 SPSSeq
00400241 PerformedStationAET                 00400244 PPSStartDate
00400245 PPSStartTime                        00400250 PPSEndDate
00400251 PPSEndTime                          00400252 PPSStatus
00400253 PPSID                               00400254 PPSDescription
00400280 PPSComments                         00400281 PPSDiscontinuationReasonCodeSeq
00400400 SPSComments                         0040100A ReasonforRequestedProcedureCodeSeq
00401006 PlacerOrderNumberProcedureRetired   00401007 FillerOrderNumberProcedureRetired
00402006 PlacerOrderNumberImagingServiceRequestRetired
00402007 FillerOrderNumberImagingServiceRequestRetired
00402016 PlacerOrderNumber                   00402017 FillerOrderNumber
00403001 ConfidentialityPatientData          00404001 GPSPSStatus
00404002 GPPPSStatus                         00404003 GPSPSPriority
00404005 SPSStartDateAndTime                 00404010 SPSModificationDateandTime
00404011 ExpectedCompletionDateAndTime       00404015 ResultingGPPPSSeq
00404016 RefGPSPSSeq                         00404023 RefGPSPSTransactionUID
00080015 InstanceCoercionDateTime            003A0314 ImpedanceMeasurementDateTime
00404008 ScheduledProcedureStepExpirationDateTime
00404050 PerformedProcedureStepStartDateTime 00404051 PerformedProcedureStepEndDateTime
"""
# Here dcm4che went ways of its own too often to be guessed; the list above holds what is known.
_UNCERTAIN = ("DateTime", "AETitle", "ProcedureStep", "GeneralPurpose", "ApplicationEntityTitle")


@lru_cache(1)
def _names() -> tuple[dict[str, int], dict[str, int], dict[int, str]]:
    """CTP's names, DICOM's keywords, and CTP's name of each tag."""
    words = _OWN.split()
    own = {name: int(tag, 16) for tag, name in zip(words[::2], words[1::2], strict=True)}
    listed = set(own.values())
    keywords = {entry[4]: tag for tag, entry in DicomDictionary.items() if entry[4]}
    names = {}
    for keyword, tag in keywords.items():
        if tag not in listed and not any(part in keyword for part in _UNCERTAIN):
            stem = keyword.removesuffix("Sequence")
            names[stem.replace("Referenced", "Ref") + "Seq" * (stem != keyword)] = tag
    names.update(own)
    return names, keywords, {tag: name for name, tag in names.items()}


def tag_of(name: str) -> int | None:
    """The tag that CTP means by a name, None for a name that is not known to be one of its."""
    return _names()[0].get(name)


def hint(name: str) -> str:
    """What to write instead of an unknown name."""
    names, keywords, by_tag = _names()
    tag = keywords.get(name)
    if tag is not None:
        if tag not in by_tag:
            return (f"it is not certain how CTP calls {name}, and what it does not know it reads as empty; "
                    f"write {tag:08X}")
        return (f"CTP does not know the DICOM keyword {name} and would read it as empty; CTP calls it {by_tag[tag]}; "
                f"write {tag:08X}")
    close = difflib.get_close_matches(name, names, 1, 0.8)
    return (f"CTP does not know an element {name} and would read it as empty; "
            + (f"did you mean {close[0]}?" if close else "write the tag, eight hexadecimal digits"))
