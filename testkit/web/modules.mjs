// The npm packages lie in a folder of their own, not above this file: node's own search would not find them.
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const npm = process.env.ANTIPHON_NPM;
if (!npm) throw new Error("ANTIPHON_NPM must name the folder whose node_modules holds the packages");
const require = createRequire(join(npm, "package.json"));

export const load = (name) => import(pathToFileURL(require.resolve(name)).href);
export const folder = (name, ...below) => join(npm, "node_modules", name, ...below);
