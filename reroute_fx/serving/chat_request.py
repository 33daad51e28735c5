"""`/v1/chat/completions` as the OpenAI client and vLLM's server have it: what a request may say."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from .bounds import Bounds
from .refusals import RequestError

_MOST_MESSAGES, _MOST_PARTS, _MOST_STOPS, _LONGEST_STOP, _MOST_ALTERNATIVES = 256, 64, 4, 256, 20

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""What the API has and the server hasn't, with the values that ask for nothing; None is one for all."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a data URL, or http(s) where that is allowed."""

    url: str = Field(min_length=1)
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(min_length=1, max_length=_MOST_PARTS)
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_a_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _pictures_are_the_users(self) -> "Message":
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.content):
            raise PydanticCustomError("picture", "has a picture; expected pictures in messages of the user")
        return self


class StreamOptions(_Strict):
    """What a stream holds besides the answer.

    Attributes:
        include_usage: the last chunk counts the tokens.
        continuous_usage_stats: every token has a chunk, which counts those up to it, as vLLM's do.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class RerouteOptions(_Strict):
    """What only this server knows.

    Attributes:
        tier: one of those that the server was started with; None for the first of them.
        return_selection: whether to be told which visual tokens each decision kept.
    """

    tier: float | None = None
    return_selection: bool = False


class ChatRequest(_Strict):
    """A conversation to go on with, and how.

    Temperature and top_p that are left out are the model's own, of its generation config. `ignore_eos` and
    `skip_special_tokens` are vLLM's: with them load tests get answers of one length, and see each token.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]] = Field(
        default_factory=list, max_length=_MOST_STOPS
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_ALTERNATIVES)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    reroute: RerouteOptions = RerouteOptions()
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # The official client sends null for what was not set; the field's default stands for it.
        return {
            name: value
            for name, value in given.items()
            if value is not None and not (name in NEUTRAL and any(_same(value, n) for n in NEUTRAL[name]))
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs is set; expected logprobs to be true with it")
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream", "stream_options is set; expected stream to be true with it")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "tokens", "max_tokens and max_completion_tokens differ; expected one of them"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Tokens of an answer that are asked for; None if no number was."""
        return self.max_completion_tokens or self.max_tokens


def read_chat_request(body: bytes, bounds: Bounds) -> ChatRequest:
    """The request in a body.

    Raises:
        RequestError: it is no such request, or asks for more than `bounds` allow; the message names the field.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)[0]) from None
    _check(request, bounds)
    return request


def _check(request: ChatRequest, bounds: Bounds) -> None:
    parts = [part for message in request.messages for part in message.content]
    pictures = sum(isinstance(part, ImagePart) for part in parts)
    characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    counted = (
        ("n", request.n, bounds.answers),
        ("max_tokens", request.token_limit or 1, bounds.tokens),
        ("messages", pictures, bounds.pictures),
        ("messages", characters, bounds.prompt_characters),
    )
    units = ("", "", "pictures", "characters")
    for (field, found, most), unit in zip(counted, units, strict=True):
        if found > most:
            has = f"has {found} {unit}" if unit else f"is {found}"
            raise RequestError(field, f"{has}; expected at most {most}.")


def _refusal(error: ErrorDetails) -> RequestError:
    # A body that is no JSON, or nested deeper than the parser goes, has no field.
    field = _path(error["loc"]) or ("body" if error["type"].startswith(("json", "model")) else "request")
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden" and name in NEUTRAL:
        return RequestError(field, "is not served; expected it to be left out.")
    if error["type"] == "extra_forbidden":
        return RequestError(field, "is unknown; expected the fields of a chat completion. Leave it out.")
    return RequestError(field, f"is refused: {error['msg'].rstrip('.')}.")


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].text``; names of the parts' kinds, which pydantic puts in between, are left out."""
    path = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (
            i and isinstance(location[i - 1], int) and step in ("text", "image_url") and "content" in path
        ):
            path += f".{step}" if path else step
    return path


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and no bool that only counts as a number."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
