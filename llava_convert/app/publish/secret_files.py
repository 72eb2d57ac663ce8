"""Files that are somebody's secret by their names: keys, tokens, passwords. No model has such."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePosixPath

# Where programs keep their keys and tokens, by their own documentation: ssh, gpg, git, curl, pip, npm, docker, kubectl,
# the clouds' and the hubs' clients, dotenv.
_FOLDERS = (".ssh", ".gnupg", ".aws", ".azure", ".gcloud", ".kube", ".docker")
_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".pgpass", ".npmrc", ".pypirc"),
    *(".htpasswd", ".dockercfg", "id_rsa", "id_dsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx"),
    *("credentials", "credentials.json", "client_secret*.json", "service_account*.json", "secrets.*", "secret.*"),
    *("token", "token.txt", "hf_token*", "stored_tokens"),
)
_EXAMPLES = (".env.example", ".env.sample", ".env.template")


def looks_secret(name: str) -> bool:
    """Whether a file's path, in the folder that it is of, is a name that keys and tokens have."""
    *folders, last = PurePosixPath(name.lower()).parts
    if any(folder in _FOLDERS for folder in folders):
        return True
    return last not in _EXAMPLES and any(fnmatch(last, pattern) for pattern in _FILES)
