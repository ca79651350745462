// Ranks sentences for a picture by an exported model, in Node.js: node search.mjs OUT PICTURE SENTENCE...
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } from "@huggingface/transformers";

const [folder, picture, ...sentences] = process.argv.slice(2);
env.allowRemoteModels = false;
const options = { local_files_only: true, dtype: "fp32" };
const tokenizer = await AutoTokenizer.from_pretrained(folder, options);
const processor = await AutoProcessor.from_pretrained(folder, options);
const texts = await CLIPTextModelWithProjection.from_pretrained(folder, options);
const pictures = await CLIPVisionModelWithProjection.from_pretrained(folder, options);
const { text_embeds } = await texts(tokenizer(sentences, { padding: true, truncation: true }));
const { image_embeds } = await pictures(await processor(await RawImage.read(picture)));
const cosine = (row) => row.data.reduce((sum, value, i) => sum + value * image_embeds.data[i], 0);
console.log(JSON.stringify(sentences.map((sentence, j) => ({ sentence, score: cosine(text_embeds[j]) }))));
