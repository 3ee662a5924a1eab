// Calls of the server's functions, which stand behind gradio's queue.

const BUSY = "Too many drawings wait. Try again in a moment.";
const GONE = "The server does not answer. Is it still running?";

// Yields the values that a function yields or returns.
export async function* values(name, request, signal) {
  let answer;
  try {
    answer = await fetch(`gradio_api/call/${name}`, {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ data: [request] }),
    });
  } catch (error) {
    throw signal?.aborted ? error : new Error(GONE);
  }
  if (answer.status === 413) throw new Error(await answer.text());
  if (!answer.ok) throw new Error(answer.status === 503 ? BUSY : `The server answered ${answer.status}.`);
  const { event_id } = await answer.json();
  const stream = await fetch(`gradio_api/call/${name}/${event_id}`, { signal });
  let seen = 0;
  for await (const { event, data } of messages(stream.body)) {
    if (event === "generating" || (event === "complete" && !seen)) {
      seen += 1;
      yield JSON.parse(data)[0];
    } else if (event === "error") {
      throw new Error((data && JSON.parse(data)) || BUSY);
    }
  }
}

// Returns the only value of a function.
export async function call(name, request) {
  for await (const value of values(name, request)) return value;
  throw new Error(GONE);
}

// Parses server-sent events.
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      yield { event: fields.event, data: fields.data };
    }
  }
}
