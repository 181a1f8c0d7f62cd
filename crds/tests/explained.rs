//! Every field has a description that states its unit and bounds, because `kubectl explain` shows nothing else.

use serde_json::Value;

#[derive(Default)]
struct Findings {
    fields: usize,
    wrong: Vec<String>,
}

/// Returns the bounds that a description must contain.
fn bounds(field: &Value) -> Vec<String> {
    let keys = ["minimum", "maximum", "minItems", "maxItems", "maxProperties"];
    let numbers = keys.iter().filter_map(|key| field.get(key)?.as_f64()).filter(|number| *number != 0.0);
    numbers.map(|number| format!("{number}")).collect()
}

/// Returns true if the text contains the number as a separate token.
fn names(text: &str, number: &str) -> bool {
    text.split(|letter: char| !letter.is_ascii_alphanumeric()).any(|word| word == number)
}

fn look(path: &str, name: &str, field: &Value, findings: &mut Findings) {
    findings.fields += 1;
    let description = field.get("description").and_then(Value::as_str).unwrap_or_default();
    let mut complain = |what: &str| findings.wrong.push(format!("{path}: {what}: {description:?}"));
    if !description.ends_with('.') {
        complain("not a sentence");
    }
    let units = [("Seconds", "second"), ("Milliseconds", "millisecond"), ("Percent", "percent")];
    for (_, unit) in units.iter().filter(|(end, _)| name.ends_with(end)) {
        if !description.contains(unit) {
            complain("unit missing");
        }
    }
    for bound in bounds(field).iter().filter(|bound| !names(description, bound)) {
        complain(&format!("bound {bound} missing"));
    }
    walk(path, field, findings);
}

fn walk(path: &str, schema: &Value, findings: &mut Findings) {
    for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        look(&format!("{path}.{name}"), name, field, findings);
    }
    if let Some(items) = schema.get("items") {
        walk(&format!("{path}[]"), items, findings);
    }
    if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
        walk(&format!("{path}{{}}"), values, findings);
    }
}

#[test]
fn descriptions_state_units_and_bounds() {
    for (file, definition) in switchtower_crds::all() {
        let definition = serde_json::to_value(&definition).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut findings = Findings::default();
        look(file, "", schema, &mut findings);
        for part in ["spec", "status"] {
            assert!(schema["properties"].get(part).is_some(), "{file} has a {part}");
        }
        assert!(findings.fields > 25, "{file}: only {} fields were checked", findings.fields);
        assert!(findings.wrong.is_empty(), "{file}:\n{}", findings.wrong.join("\n"));
    }
}
