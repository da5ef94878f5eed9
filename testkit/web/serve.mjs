// Static files on a free loopback port. hook(request, response, path) returns true when it has answered.
import { createReadStream, existsSync, statSync } from "node:fs";
import http from "node:http";
import { extname, join, normalize } from "node:path";

const types = {
  ".css": "text/css",
  ".html": "text/html",
  ".js": "text/javascript",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
  ".woff2": "font/woff2",
};

export function serve(directory, hook = () => false) {
  const server = http.createServer((request, response) => {
    const path = new URL(request.url, "http://localhost").pathname;
    if (hook(request, response, path)) return;
    const file = join(directory, normalize(decodeURIComponent(path)));
    if (!existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
    response.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" });
    createReadStream(file).pipe(response);
  });
  return new Promise((ready) =>
    server.listen(0, "127.0.0.1", () =>
      // `localhost` and not the address: only that name makes a plain HTTP page a secure context everywhere.
      ready({ base: `http://localhost:${server.address().port}`, close: () => (server.closeAllConnections(), server.close()) }),
    ),
  );
}
