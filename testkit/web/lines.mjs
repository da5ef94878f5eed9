// A program that is driven over its standard input and output, one JSON object per line:
// in {id, cmd, args}, out {id, result} or {id, error}. The end of the input ends the program.
import { createInterface } from "node:readline";

export function drive(commands, close) {
  const answer = (message) => process.stdout.write(JSON.stringify(message) + "\n");
  const lines = createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    const { id, cmd, args } = JSON.parse(line);
    try {
      if (!Object.hasOwn(commands, cmd)) throw new Error(`unknown command ${cmd}`);
      answer({ id, result: (await commands[cmd](args ?? {})) ?? null });
    } catch (error) {
      answer({ id, error: String(error?.stack ?? error) });
    }
  });
  lines.on("close", async () => {
    await close?.().catch(() => {});
    process.exit(0);
  });
}

export async function until(condition, milliseconds, what) {
  for (const end = Date.now() + milliseconds; Date.now() < end; ) {
    const value = await condition();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`${what} did not happen within ${milliseconds} ms`);
}
