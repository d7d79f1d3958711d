"""Log lines as JSON objects, each with the id of the HTTP request that it is about."""

import logging
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# At lower levels they tell of requests with their signatures.
_TALKATIVE = ("aioboto3", "aiobotocore", "boto3", "botocore", "httpcore", "httpx")


class JsonFormatter(logging.Formatter):
    """One line for each record; what a record has in `fields` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id_var.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode({name: value for name, value in line.items() if value is not None}).decode()


def set_up_logs(log_level: str, log_format: str) -> None:
    """Log to stderr, as the fields of these names in the config say."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    if log_level != "debug":
        logging.getLogger("hypercorn").setLevel(logging.WARNING)
