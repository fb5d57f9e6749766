"""Which requests may make the language model work: those of this server's own pages and of the person at the browser.

Any page of the web can point a picture or a form at this address. It could not read the answer, but the model would compute it.
"""

from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request

from everyscope.base.errors import ConfigError, EveryscopeError

MAX_FORM_BYTES, FORM_SECONDS = 1 << 16, 10.0
"""A form's size [bytes], and the time that a client may take to send it [s]."""
MAX_FIELDS = 64
FORM_TYPE = "application/x-www-form-urlencoded"


class Forbidden(EveryscopeError):
    """A request of another site's page."""


def require_own(request: Request) -> None:
    """Forbidden for a request that another site's page sends, by what browsers say of it.

    Browsers since 2023 send Sec-Fetch-Site, and pages cannot change it; older ones send Origin with forms, and Referer.
    Programs send none of them, and any program on this machine could run the model itself.
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    own = f"http://{headers.get('host', '')}"
    if origin == "null" and site == "same-origin":  # of a form, where the browser keeps to a stricter policy than ours
        origin = own
    referer = headers.get("referer")
    came_from = None if referer is None else "{0.scheme}://{0.netloc}".format(urlsplit(referer))
    is_own = site in (None, "same-origin", "none") and origin in (None, own) and (site is not None or came_from in (None, own))
    if not is_own:
        raise Forbidden("another site's page asked for this; open the page here and ask again")


async def read_form(request: Request) -> dict[str, list[str]]:
    """Every value of each field of a form that was sent; ConfigError where it is none, or larger than a form here can be."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM_TYPE:
        raise ConfigError(f"expected a form, {FORM_TYPE}; use the one on this page")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise ConfigError(f"the form has more than {MAX_FORM_BYTES:,} bytes; shorten the text")
    try:
        return parse_qs(body.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise ConfigError(f"the form cannot be read ({error}); use the one on this page") from error
