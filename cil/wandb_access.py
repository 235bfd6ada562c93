"""Whether W&B can be used online from here: wish, account and network. It imports no wandb."""

import http.client
import netrc
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]
Wish = Literal["auto", "online", "offline", "disabled"]

PROBE_SECONDS = 5  # a W&B client that is refused at once still retries for minutes


def choose_mode(wish: Wish) -> Mode:
    """The mode for a wish; auto follows WANDB_MODE where set, else whether there is an account."""
    if wish != "auto":
        return wish
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked == "disabled":
        return "disabled"
    if asked in ("offline", "dryrun"):
        return "offline"
    return "online" if asked == "online" or has_account() else "offline"


def has_account() -> bool:
    """Whether credentials for the W&B server are found, without asking anybody for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    host = urlsplit(base_url()).hostname or ""
    for place in places:
        try:
            entry = netrc.netrc(Path(place).expanduser()).authenticators(host)
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue  # no such file, no home, or one that W&B could not read either
        if entry is not None and entry[2]:
            return True
    return False


def reachable() -> bool:
    """Whether the W&B server (or the proxy before it) answers within some seconds.

    Any answer will do, a refusal too. A certificate that Python does not know is left to W&B, which
    has its own list.
    """
    try:
        urllib.request.urlopen(base_url(), timeout=PROBE_SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException, ValueError):
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
