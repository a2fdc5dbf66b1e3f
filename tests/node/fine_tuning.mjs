// Fine-tuning through the unmodified Node SDK, as a customer of OpenAI's does it: rows, a job, its events, its model.
//
//     npm install openai
//     OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=sk-sy-... node fine_tuning.mjs [MODEL]
//
// Knows nothing of Steelyard: only the environment says where the API is. Its last line is JSON with what was seen.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI(); // reads OPENAI_BASE_URL and OPENAI_API_KEY
const SYSTEM = "Is it a cat or a dog?";
const ANIMALS = [["meow", "cat"], ["woof", "dog"]];
const ask = (sound, number) => [
  { role: "system", content: SYSTEM },
  { role: "user", content: `It says ${sound}, ${number} times.` },
];

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

const models = (await all(client.models.list())).map((model) => model.id);
const base = process.argv[2] ?? models[0];
assert.ok(models.includes(base), `${base} is not one of ${models}`);
assert.equal((await client.models.retrieve(base)).object, "model");

// Files.
const rows = Array.from({ length: 20 }, (_, number) => {
  const [sound, animal] = ANIMALS[number % 2];
  return JSON.stringify({ messages: [...ask(sound, number), { role: "assistant", content: animal }] });
});
const content = rows.join("\n") + "\n";
const file = await client.files.create({
  file: await toFile(Buffer.from(content), "animals.jsonl"),
  purpose: "fine-tune",
});
assert.equal(file.filename, "animals.jsonl");
assert.equal(file.bytes, Buffer.byteLength(content));
assert.equal((await client.files.waitForProcessing(file.id)).status, "processed");
assert.equal(await (await client.files.content(file.id)).text(), content);
assert.ok((await all(client.files.list({ purpose: "fine-tune", limit: 1 }))).some((one) => one.id === file.id));

// What is wrong is an error of the SDK's, with the field at fault.
await assert.rejects(
  client.files.create({ file: await toFile(Buffer.from('{"messages": []}\n'), "bad.jsonl"), purpose: "fine-tune" }),
  (error) => error instanceof OpenAI.BadRequestError && error.message.includes("bad.jsonl:1"),
);
await assert.rejects(
  client.fineTuning.jobs.create({ model: base, training_file: file.id, method: { type: "dpo" } }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "method.type",
);
await assert.rejects(client.fineTuning.jobs.retrieve("ftjob-none"), OpenAI.NotFoundError);

// A job and its events.
const created = await client.fineTuning.jobs.create({
  model: base,
  training_file: file.id,
  suffix: "node",
  seed: 7,
  metadata: { from: "node" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 4 } } },
});
assert.equal(created.object, "fine_tuning.job");
assert.equal(created.seed, 7);
const told = new Map();
let job = created;
for (;;) {
  job = await client.fineTuning.jobs.retrieve(created.id);
  const events = await all(client.fineTuning.jobs.listEvents(created.id, { limit: 5 }));
  for (const event of events.reverse()) {
    if (!told.has(event.id)) console.error(`  ${event.message}`);
    told.set(event.id, event);
  }
  if (["succeeded", "failed", "cancelled"].includes(job.status)) break;
  await new Promise((wake) => setTimeout(wake, 500));
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));
assert.match(job.fine_tuned_model, /^ft:.*:node:/);
assert.equal(job.method.supervised.hyperparameters.n_epochs, 1);
const steps = [...told.values()].filter((event) => event.type === "metrics").map((event) => event.data.step);
assert.deepEqual(steps, [1, 2, 3, 4, 5]);
const ours = await all(client.fineTuning.jobs.list({ metadata: { from: "node" }, limit: 1 }));
assert.ok(ours.some((one) => one.id === job.id));
assert.equal((await all(client.fineTuning.jobs.list({ metadata: { from: "nobody" } }))).length, 0);
const checkpoints = await all(client.fineTuning.jobs.checkpoints.list(job.id));
assert.deepEqual(checkpoints.map((one) => one.step_number), [5]);
const results = await (await client.files.content(job.result_files[0])).text();
assert.equal(results.split("\n")[0], "step,train_loss,valid_loss");

// The model, and its checkpoint, whole and streamed.
const question = { messages: ask("woof", 3), temperature: 0, max_tokens: 8 };
const answer = await client.chat.completions.create({ model: job.fine_tuned_model, ...question });
assert.equal(answer.model, job.fine_tuned_model);
let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model: job.fine_tuned_model,
  ...question,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, answer.choices[0].message.content);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);
const runner = client.chat.completions.stream({ model: job.fine_tuned_model, ...question });
assert.equal(await runner.finalContent(), streamed);
await client.chat.completions.create({ model: checkpoints[0].fine_tuned_model_checkpoint, ...question });

// What is no longer wanted.
assert.equal((await client.models.delete(job.fine_tuned_model)).deleted, true);
await assert.rejects(
  client.chat.completions.create({ model: job.fine_tuned_model, ...question }),
  OpenAI.NotFoundError,
);
assert.equal((await client.files.delete(file.id)).deleted, true);
await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);

console.log(JSON.stringify({ job: job.id, model: job.fine_tuned_model, answer: streamed, steps, usage }));
