// /openapi.json as a page to read.

function h(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const nameOf = (schema) => schema.$ref?.split("/").at(-1);

function typeOf(schema) {
  if (schema.$ref) return link(nameOf(schema));
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return h("span", "", ...options.flatMap((option, i) => [i ? " | " : "", typeOf(option)]));
  if (schema.type === "array" && schema.items) return h("span", "", "list of ", typeOf(schema.items));
  return [schema.type ?? "any", schema.format && `(${schema.format})`].filter(Boolean).join(" ");
}

function link(name) {
  const element = h("a", "", name);
  element.href = `#${name}`;
  return element;
}

function fields(properties, required = []) {
  const rows = Object.entries(properties).map(([name, schema]) => {
    const notes = [schema.description, required.includes(name) && "required", schema.default != null && `default ${JSON.stringify(schema.default)}`];
    return h("tr", "", h("td", "", h("code", "", name)), h("td", "", typeOf(schema)), h("td", "", notes.filter(Boolean).join("; ")));
  });
  return h("table", "", ...rows);
}

function operation(path, method, spec) {
  const title = h("summary", "", h("b", `method ${method}`, method.toUpperCase()), " ", h("code", "", path), " ", h("span", "muted", spec.summary));
  const parts = [title];
  if (spec.parameters.length) parts.push(fields(Object.fromEntries(spec.parameters.map((p) => [`${p.name} (${p.in})`, p.schema]))));
  for (const [type, body] of Object.entries(spec.requestBody?.content ?? {})) parts.push(h("p", "", `takes ${type}: `, typeOf(body.schema)));
  for (const [status, answer] of Object.entries(spec.responses))
    parts.push(h("p", "", h("b", "", status), ` ${answer.description} `, ...Object.entries(answer.content).flatMap(([type, body]) => [h("span", "muted", ` ${type}: `), typeOf(body.schema)])));
  return h("details", "panel", ...parts);
}

const spec = await (await fetch("openapi.json")).json();
const main = document.getElementById("operations");
const tags = new Map();
for (const [path, methods] of Object.entries(spec.paths))
  for (const [method, one] of Object.entries(methods)) tags.set(one.tags[0], [...(tags.get(one.tags[0]) ?? []), operation(path, method, one)]);
main.replaceChildren(...[...tags].map(([tag, operations]) => h("section", "", h("h2", "", tag), ...operations)));
const types = Object.entries(spec.components.schemas).sort().map(([name, schema]) => {
  const element = h("details", "panel", h("summary", "", h("code", "", name), " ", h("span", "muted", schema.description ?? "")), fields(schema.properties ?? {}, schema.required));
  element.id = name;
  return element;
});
main.append(h("section", "", h("h2", "", "Types"), ...types));
addEventListener("hashchange", () => { const target = document.getElementById(location.hash.slice(1)); if (target) target.open = true; });
