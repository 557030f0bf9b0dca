// The completions API, as an async iterator over the events of a stream.

/** Yields {queue: position} while waiting, then OpenAI's chunks. Throws what went wrong. */
export async function* complete(request, signal) {
  const response = await fetch("v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new Error(error?.message ?? `the server answered ${response.status}: try again`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection to the server was lost: try again");
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (event.startsWith(": queue ")) yield { queue: Number(event.slice(8)) };
      else yield JSON.parse(event.slice("data: ".length));
    }
  }
}
