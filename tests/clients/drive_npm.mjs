// What a publisher does with @huggingface/hub, in one go; see drive_hf.py.
//
//   node drive_npm.mjs ENDPOINT REPO WAY FOLDER PACKAGE       WAY: lfs | xet; PACKAGE: where the client is installed
//
// Prints one line of JSON.
import { readFile, readdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [hubUrl, name, way, folder, installed] = process.argv.slice(2);
const find = createRequire(join(installed, "package.json"));
const entry = find.resolve("@huggingface/hub").replace(/\.js$/, ".mjs");
const hub = await import(pathToFileURL(entry));
const accessToken = process.env.HF_TOKEN;
const repo = { type: "model", name };
const common = { repo, hubUrl, accessToken };
const about = JSON.parse(await readFile(join(installed, "node_modules/@huggingface/hub/package.json"), "utf8"));
const done = { version: about.version };

const text = async (path, revision) => (await hub.downloadFile({ ...common, path, revision })).text();
const all = async (listed) => {
	const items = [];
	for await (const item of listed) items.push(item);
	return items;
};

await hub.createRepo({ ...common, private: true });
done.again = await hub.createRepo(common).catch((e) => e.statusCode);
const paths = (await readdir(folder, { recursive: true, withFileTypes: true }))
	.filter((item) => item.isFile())
	.map((item) => join(item.parentPath ?? item.path, item.name).slice(folder.length + 1))
	.sort();
const files = await Promise.all(
	paths.map(async (path) => ({ path, content: new Blob([await readFile(join(folder, path))]) })),
);
const head = (await hub.modelInfo({ name, hubUrl, accessToken, additionalFields: ["sha"] })).sha;
const first = await hub.uploadFiles({ ...common, files, commitTitle: "first", parentCommit: head, useXet: way === "xet" });
done.commit = first.commit.oid;

const entries = (await all(hub.listFiles({ ...common, recursive: true }))).filter((item) => item.type === "file");
done.tree = Object.fromEntries(entries.map((item) => [item.path, [item.size, item.lfs?.oid ?? null]]));
done.xet = entries.filter((item) => item.xetHash).map((item) => item.path);
const model = await readFile(join(folder, "model.safetensors"));
const same = [];
// It asks for a file's first byte to learn its size, which an empty file has not: it cannot download one.
for (const path of paths.filter((path) => done.tree[path][0] > 0)) {
	const blob = await hub.downloadFile({ ...common, path, revision: first.commit.oid });
	if (Buffer.from(await blob.arrayBuffer()).equals(await readFile(join(folder, path)))) same.push(path);
}
done.snapshot = same;
done.range = {};
for (const xet of [true, false]) {
	const blob = await hub.downloadFile({ ...common, path: "model.safetensors", revision: first.commit.oid, xet });
	const part = Buffer.from(await blob.slice(400_000, 650_000).arrayBuffer());
	done.range[xet ? "as offered" : "plain"] = part.equals(model.subarray(400_000, 650_000));
}
const info = await hub.fileDownloadInfo({ ...common, path: "model.safetensors" });
done.info = [info.size, Boolean(info.xet)];
done.paths = (await hub.pathsInfo({ ...common, paths: ["config.json", "nope"] })).map((item) => item.path);
done.absent = [await hub.downloadFile({ ...common, path: "nope" }), await hub.fileExists({ ...common, path: "nope" })];

await hub.createBranch({ ...common, branch: "next", revision: first.commit.oid });
const small = (content) => ({ path: "config.json", content: new Blob([content]) });
await hub.uploadFile({ ...common, branch: "next", file: small("{}\n"), commitTitle: "on a branch" });
done.branch = await text("config.json", "next");
await hub.deleteBranch({ ...common, branch: "next" });
const late = { ...common, file: small("{}"), parentCommit: head };
done["moved head"] = await hub.uploadFile(late).catch((e) => e.statusCode);

const opened = await hub.commit({
	...common,
	title: "two",
	isPullRequest: true,
	operations: [{ operation: "addOrUpdate", ...small('{"a": 2}\n') }],
});
done.pr = [new URL(opened.pullRequestUrl).pathname, await text("config.json", "refs/pr/1")];
// The client has nothing to merge with; a person does it on the page.
await fetch(`${hubUrl}/api/models/${name}/discussions/1/merge`, {
	method: "POST",
	headers: { Authorization: `Bearer ${accessToken}` },
});
done.merged = await text("config.json");
await hub.deleteFiles({ ...common, paths: ["sub/empty.txt"], commitTitle: "less" });
done.history = (await all(hub.listCommits({ ...common, batchSize: 2 }))).map((commit) => commit.title);
done.count = await hub.countCommits(common);

const owner = name.split("/")[0];
const made = await hub.createCollection({ hubUrl, accessToken, collection: { title: "Ladder", namespace: owner } });
const collections = await all(hub.listCollections({ hubUrl, accessToken, search: { owner: [owner] } }));
done.collection = collections.map((item) => item.slug === made.slug); // it has a function to add items, not exported
await hub.deleteCollection({ hubUrl, accessToken, slug: made.slug });
done.listed = (await all(hub.listModels({ hubUrl, accessToken, search: { owner } }))).map((item) => item.name);
done.who = (await hub.whoAmI({ hubUrl, accessToken })).name;
await hub.checkRepoAccess(common);
await hub.deleteRepo(common);
done.exists = await hub.repoExists(common);
console.log(JSON.stringify(done));
