"""The site's time server: answers NTP (RFC 5905) with this machine's time, or with one that is SECONDS ahead.

clock.py [SECONDS]
"""

import socket
import struct
import sys
import time

SINCE_1900 = 2208988800
SECOND_HAND = b"\x24\x02\x06\xec"  # a server of version 4, stratum 2, that reads its clock to a microsecond


def serve(ahead: float) -> None:
    """Run for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind(("0.0.0.0", 123))
        while True:
            question, caller = wire.recvfrom(1024)
            now = int((time.time() + SINCE_1900 + ahead) * 2**32)
            if len(question) >= 48:
                answer = struct.pack("!II4sQ8sQQ", 0, 64, b"LABS", now, question[40:48], now, now)
                wire.sendto(SECOND_HAND + answer, caller)


if __name__ == "__main__":
    serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
