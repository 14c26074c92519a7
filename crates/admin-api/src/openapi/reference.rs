//! `docs/admin-api.md`: the OpenAPI document as a page for people. Only a test calls it, which writes and compares the page.

use std::fmt::Write as _;

use serde_json::Value;

use crate::{Code, Operation};

const INTRODUCTION: &str = "\
# Admin API

Made from the API's types by `make openapi`; do not edit. `docs/openapi.json` is the same for programs, and what an agent
serves at `/openapi.json`.

HTTPS with JSON on port 7445, with a client certificate whose SPIFFE ID is an admin's. Who may do what: the roles of
`kms-agent admin issue`. `{cluster}` is a name or a cluster id. Lists come in pages: `limit` and `after` in, `items` and
`next` out. Every answer has an `x-request-id`, which the agent's log has too.

Requests refuse unknown fields and parameters. In answers, ignore members that you do not know, and take an unknown value of an
open list as \"something newer\".

A change takes `reason` (stands in the audit), `dry_run`, an `idempotency-key` (the same key with the same request gets the
first one's answer, for ten minutes), and unless it makes something new or rolls the CA, `if-match` with the `revision`
that the caller has seen, in quotes. It answers `applied`, `effects`, `warnings` and, if it was done, `result`.

```sh
curl --cert first.crt --key first.key --insecure https://10.0.0.1:7445/v1/clusters     # the agent has no host name to check
```
";

/// The page.
pub(super) fn page(document: &Value) -> String {
    let mut page = INTRODUCTION.to_owned();
    page.push_str("\n## Operations\n");
    for operation in Operation::ALL {
        let method = operation.method().as_str();
        let described = &document["paths"][operation.path()][method.to_lowercase()];
        operation_section(&mut page, *operation, described);
    }
    page.push_str("\n## Types\n");
    for (name, schema) in document["components"]["schemas"].as_object().into_iter().flatten() {
        type_section(&mut page, name, schema);
    }
    page.push_str("\n## Problems\n\n`application/problem+json` (RFC 9457). Programs go by `code`, never by the texts.\n");
    page.push_str("\n| code | status | title |\n|---|---|---|\n");
    for known in Code::KNOWN {
        let code = Code::from(*known);
        line(&mut page, &format!("| `{known}` | {} | {} |", code.status(), code.title()));
    }
    page
}

fn operation_section(page: &mut String, operation: Operation, described: &Value) {
    let method = operation.method().as_str();
    page.push_str(&format!("\n### {method} {}\n\n", operation.path()));
    line(page, &format!("{} Operation `{}`.", operation.summary(), operation.id()));
    let parameters = described["parameters"].as_array();
    if let Some(parameters) = parameters.filter(|parameters| !parameters.is_empty()) {
        page.push_str("\n| parameter | in | type | meaning |\n|---|---|---|---|\n");
        for parameter in parameters {
            let (name, place) = (text(&parameter["name"]), text(&parameter["in"]));
            let meaning = text(&parameter["description"]);
            line(page, &format!("| `{name}` | {place} | {} | {meaning} |", kind(&parameter["schema"])));
        }
    }
    if let Some(body) = described["requestBody"]["content"]["application/json"].get("schema") {
        let optional = if described["requestBody"]["required"] == true { "" } else { ", may be left out" };
        line(page, &format!("\nBody: {}{optional}.", kind(body)));
    }
    for (status, answer) in described["responses"].as_object().into_iter().flatten() {
        if let Some(schema) = answer["content"]["application/json"].get("schema") {
            line(page, &format!("\nAnswer {status}: {}. {}", kind(schema), text(&answer["description"])));
        }
    }
}

fn type_section(page: &mut String, name: &str, schema: &Value) {
    page.push_str(&format!("\n### {name}\n\n"));
    if let Some(description) = schema["description"].as_str() {
        line(page, &one_line(description));
    }
    let Some(properties) = schema["properties"].as_object() else {
        line(page, &format!("{}.", kind(schema)));
        return;
    };
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    page.push_str("\n| member | type | meaning |\n|---|---|---|\n");
    for (member, schema) in properties {
        let optional = if required.contains(&member.as_str()) { "" } else { ", optional" };
        let meaning = one_line(schema["description"].as_str().unwrap_or_default());
        line(page, &format!("| `{member}` | {}{optional} | {meaning} |", kind(schema)));
    }
}

/// A schema in few words.
fn kind(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap_or_default();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some([one]) = schema["allOf"].as_array().or(schema["oneOf"].as_array()).map(Vec::as_slice) {
        return kind(one);
    }
    if schema["type"] == "array" {
        return format!("list of {}", kind(&schema["items"]));
    }
    let mut words = text(&schema["type"]).to_owned();
    if let Some(known) = schema["x-extensible-enum"].as_array() {
        let known: Vec<String> = known.iter().map(|value| format!("`{}`", text(value))).collect();
        _ = write!(words, ", open list: {}", known.join(", "));
    }
    for (key, said) in [
        ("format", ""),
        ("minimum", "at least "),
        ("maximum", "at most "),
        ("maxLength", "at most this long: "),
        ("pattern", "as "),
    ] {
        match &schema[key] {
            Value::Null => {}
            Value::String(value) if key == "pattern" => {
                _ = write!(words, ", as `{}`", value.replace('|', "\\|"));
            }
            Value::String(value) => _ = write!(words, ", {said}{value}"),
            value => _ = write!(words, ", {said}{value}"),
        }
    }
    words
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn line(page: &mut String, text: &str) {
    page.push_str(text.trim_end());
    page.push('\n');
}
