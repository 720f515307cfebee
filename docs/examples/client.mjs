// What a detector finds in a picture, a line a box: node client.mjs IMAGE [URL] [MODEL]
// `detect` runs in a browser too, on the File of an <input> or any Blob, in a page of the server's own origin.

export async function detect(picture, url = "http://127.0.0.1:8000", model = "detector") {
  const response = await fetch(`${url}/v2/models/${model}/detect?score_threshold=0.5`, { method: "POST", body: picture });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${response.status}: ${answer.error}`);
  return answer.detections;
}

if (globalThis.process?.argv[2]) {
  const { readFile } = await import("node:fs/promises");
  const [path, url, model] = process.argv.slice(2);
  for (const { label, score, box } of await detect(await readFile(path), url, model)) {
    const corners = box.map((value) => value.toFixed(1)).join(" ");
    console.log(`${path}: ${label} ${score.toFixed(2)} at ${corners}`);
  }
}
