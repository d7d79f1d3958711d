// OpenAI's client of npm, unchanged, against a server: node client.mjs URL pictures|edits|videos
import assert from "node:assert/strict";
import OpenAI, { BadRequestError, NotFoundError, toFile } from "openai";

const [url, what] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = "any";
const PNG = Buffer.from([0x89, 0x50, 0x4e, 0x47]);
// 8x8, red.
const SMALL_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mP4z8CAFTEMLQkAKP8/wc53yE8AAAAASUVORK5CYII=";
const decoded = (b64) => Buffer.from(b64, "base64");
const isPng = (bytes) => bytes.subarray(0, 4).equals(PNG);

async function pictures() {
  const steps = { num_inference_steps: 4, seed: 7 };
  const made = await client.images.generate({ model, prompt: "a red circle", n: 2, size: "256x256", ...steps });
  assert.equal(made.data.length, 2);
  assert.equal(made.size, "256x256");
  const picture = decoded(made.data[0].b64_json);
  assert.ok(isPng(picture));

  // The model has no pipeline for edits.
  const image = await toFile(picture, "picture.png", { type: "image/png" });
  await assert.rejects(client.images.edit({ model, prompt: "a blue circle", image, ...steps }), BadRequestError);

  const types = [];
  const stream = await client.images.generate({ model, prompt: "a red circle", stream: true, partial_images: 2, ...steps });
  for await (const event of stream) {
    types.push(event.type);
    assert.ok(isPng(decoded(event.b64_json)));
  }
  assert.equal(types.at(-1), "image_generation.completed");
  assert.deepEqual(types.slice(0, -1), ["image_generation.partial_image", "image_generation.partial_image"]);

  await assert.rejects(client.images.generate({ model, prompt: "a cat", n: 11 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, "n");
    assert.match(error.message, /11/);
    return true;
  });
}

async function edits() {
  const image = await toFile(decoded(SMALL_PNG), "picture.png", { type: "image/png" });
  const edited = await client.images.edit({ model, prompt: "a blue circle", image, n: 2, seed: 7 });
  assert.equal(edited.data.length, 2);
  assert.ok(isPng(decoded(edited.data[0].b64_json)));

  const types = [];
  const stream = await client.images.edit({ model, prompt: "a cat", image: [image], stream: true, partial_images: 1 });
  for await (const event of stream) types.push(event.type);
  assert.deepEqual(types, ["image_edit.partial_image", "image_edit.completed"]);
}

async function videos() {
  const small = { num_frames: 5, num_inference_steps: 2, partial_images: 0 };
  let video = await client.videos.create({ model, prompt: "a red circle", ...small });
  const other = await client.videos.create({ model, prompt: "a blue circle", ...small });
  assert.equal(video.object, "video");
  while (["queued", "in_progress"].includes(video.status)) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    video = await client.videos.retrieve(video.id);
  }
  assert.equal(video.status, "completed");
  assert.equal(video.progress, 100);

  const listed = [];
  for await (const one of client.videos.list({ limit: 1, order: "asc" })) listed.push(one.id);
  assert.deepEqual(listed, [video.id, other.id]);

  const file = Buffer.from(await (await client.videos.downloadContent(video.id)).arrayBuffer());
  assert.equal(file.subarray(4, 8).toString(), "ftyp");

  assert.equal((await client.videos.delete(video.id)).deleted, true);
  await client.videos.delete(other.id);
  await assert.rejects(client.videos.retrieve(video.id), NotFoundError);
}

await { pictures, edits, videos }[what]();
console.log("done");
