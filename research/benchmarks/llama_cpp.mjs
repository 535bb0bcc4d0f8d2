// Run a GGUF file in llama.cpp: greedy tokens and perplexity, as JSON. Used by anywhere.py; needs the npm package node-llama-cpp.
//
//   echo '{"model": "model.gguf", "prompt": [1, 2], "new_tokens": 32, "windows": [[1, 2, 3]]}' | node llama_cpp.mjs node_modules
import {readFileSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const packages = path.resolve(process.argv[2]);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(path.join(packages, "node-llama-cpp/dist/index.js")));
const job = JSON.parse(readFileSync(0, "utf8"));
const start = performance.now();
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
const contextSize = Math.max(job.prompt.length + job.new_tokens, ...job.windows.map((one) => one.length)) + 8;
const context = await model.createContext({contextSize, flashAttention: false});
const sequence = context.getSequence();
const tokens = [];
if (job.new_tokens > 0)
    for await (const token of sequence.evaluate(job.prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === job.new_tokens) break;
    }
let loss = 0, count = 0;
for (const window of job.windows) {
    await sequence.clearHistory();
    const input = window.slice(0, -1).map((token) => [token, {generateNext: {probabilities: true}}]);
    await sequence.controlledEvaluate(input, {onTokenResult(index, result) {
        loss -= Math.log(result.next.probabilities.get(window[index + 1]));
        count += 1;
    }});
}
const versions = {llama_cpp: llama.llamaCppRelease, node_llama_cpp: JSON.parse(readFileSync(path.join(packages, "node-llama-cpp/package.json"))).version};
const seconds = (performance.now() - start) / 1000;
console.log(JSON.stringify({tokens, perplexity: count ? Math.exp(loss / count) : null, scored: count, seconds, versions}));
process.exit(0);
