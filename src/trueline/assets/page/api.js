// The server's own interface, as any client uses it.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failed(answer) {
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no error object: the status has to do */ }
  return new ApiError(answer.status, message);
}

export async function get(path, key) {
  const answer = await fetch(path, { headers: headers(key) });
  if (!answer.ok) throw await failed(answer);
  return answer.json();
}

/** Yield the chunks of a streamed chat. */
export async function* chat(body, key, signal) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify({ ...body, stream: true }), signal,
  });
  if (!answer.ok) throw await failed(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(0, chunk.error.message);
      yield chunk;
    }
  }
}
