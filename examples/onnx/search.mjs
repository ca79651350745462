// Rank captions for an image with an exported model, in Node.js: node search.mjs EXPORTED IMAGE CAPTION...
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } from "@huggingface/transformers";

const [folder, image, ...captions] = process.argv.slice(2);
env.allowRemoteModels = false;
const options = { local_files_only: true, dtype: "fp32" };
const tokenizer = await AutoTokenizer.from_pretrained(folder, options);
const processor = await AutoProcessor.from_pretrained(folder, options);
const texts = await CLIPTextModelWithProjection.from_pretrained(folder, options);
const images = await CLIPVisionModelWithProjection.from_pretrained(folder, options);
const { text_embeds } = await texts(tokenizer(captions, { padding: true, truncation: true }));
const { image_embeds } = await images(await processor(await RawImage.read(image)));
// Both embeddings have length one, so their product is the cosine.
const cosine = (row) => row.data.reduce((sum, value, i) => sum + value * image_embeds.data[i], 0);
console.log(JSON.stringify(captions.map((sentence, j) => ({ sentence, score: cosine(text_embeds[j]) }))));
