// What the page asks of the server. A refusal is one line of text, thrown as an Error.

async function answered(response) {
  if (response.ok) return response;
  throw new Error((await response.text()).trim() || `the server said ${response.status}`);
}

function post(path, asked, signal) {
  return fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  }).then(answered, (error) => {
    throw error.name === "AbortError" ? error : new Error("the server does not answer: is it still running?");
  });
}

/** {models, missing, presets, defaults, limits} */
export async function models() {
  return (await answered(await fetch("/api/models"))).json();
}

/** A puzzle to be shown, by {model, text}, {model, seed, level} or {model, example}. */
export async function puzzle(asked, signal) {
  return (await post("/api/puzzle", asked, signal)).json();
}

/** Every line of an answer, as it comes: {start}, {frame} ..., {answer} or {error}. */
export async function* solve(asked, signal) {
  const reader = (await post("/api/solve", asked, signal)).body.getReader();
  const decoder = new TextDecoder();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    kept += done ? "" : decoder.decode(value, { stream: true });
    const lines = kept.split("\n");
    kept = lines.pop();
    for (const line of lines) yield JSON.parse(line);
    if (done) return;
  }
}
