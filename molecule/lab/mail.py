"""The coordinating site's mail server: takes mail over TLS from those who log in, and keeps it as files.

mail.py USER PASSWORD CERTIFICATE KEY
"""

import asyncio
import ssl
import sys

from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword


async def serve(user: str, password: str, certificate: str, key: str) -> None:
    """Run for ever."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    expected = LoginPassword(user.encode(), password.encode())

    def server() -> SMTP:
        return SMTP(Mailbox("/var/lib/mail"), tls_context=context, require_starttls=True, auth_required=True,
                    authenticator=lambda *arguments: AuthResult(success=arguments[-1] == expected))

    await asyncio.get_running_loop().create_server(server, "0.0.0.0", 587)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
