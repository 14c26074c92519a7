//! The OpenAPI 3.1 document, made from the table of operations and the types.
//!
//! `docs/openapi.json` is this document, and `docs/admin-api.md` the same for people; a test compares them.

#[cfg(test)]
mod reference;

use serde_json::json;
use utoipa::ToSchema;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::schema::{ComponentsBuilder, KnownFormat, Object, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{
    Content, Header, InfoBuilder, OpenApi, OpenApiBuilder, Paths, Ref, RefOr, Required, Schema,
};

use crate::audit::MAX_SEARCHED;
use crate::change::{IDEMPOTENCY_KEY, MAX_IDEMPOTENCY_KEY, MAX_REASON, REQUEST_ID};
use crate::operations::Kind;
use crate::paging::{DEFAULT_LIMIT, MAX_CURSOR, MAX_LIMIT};
use crate::problem::{MEDIA_TYPE, Problem};
use crate::{
    Admin, AuditHead, AuditRecord, Ca, Change, Cluster, CreateCluster, CreateToken, Explanation, IssuedToken,
    Method, Node, Operation, Page, RenameCluster, RestoreCluster, RotateCa, RotateKey, RotatedCa,
    SetMaxOffline, SetRoles, SetRotation, SetScope, Slot, Status, Token, Version, Worker,
};

const JSON: &str = "application/json";

/// The document.
pub fn document() -> OpenApi {
    let mut schemas = Schemas(ComponentsBuilder::new());
    let problem = schemas.add::<Problem>();
    let mut paths = Paths::new();
    for operation in Operation::ALL {
        let described = describe(*operation, &mut schemas, &problem);
        let method = match operation.method() {
            Method::Get => HttpMethod::Get,
            Method::Post => HttpMethod::Post,
            Method::Put => HttpMethod::Put,
            Method::Delete => HttpMethod::Delete,
        };
        paths.add_path_operation(operation.path(), vec![method], described);
    }
    let info = InfoBuilder::new()
        .title("fleet-kms admin API")
        .version("1")
        .description(Some(
            "Administration of fleet-kms over HTTPS with a client certificate whose SPIFFE ID is an \
             admin's. Clients must ignore members that they do not know, and take a value that they do not \
             know in an `x-extensible-enum` as \"something newer\". `{cluster}` is a name or a cluster id.",
        ))
        .build();
    OpenApiBuilder::new().info(info).paths(paths).components(Some(schemas.0.build())).build()
}

/// The document as it stands in the tree and as it is served.
pub fn document_json() -> String {
    let mut text = serde_json::to_string_pretty(&document()).expect("the document is plain JSON");
    text.push('\n');
    text
}

/// Schema of an enum of answers: known values, and others may come.
pub(crate) fn open_text(known: &[&str]) -> Object {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .extensions(Some(ExtensionsBuilder::new().add("x-extensible-enum", json!(known)).build()))
        .build()
}

struct Schemas(ComponentsBuilder);

impl Schemas {
    /// Adds a type with all that it names, and answers its reference.
    fn add<T: ToSchema>(&mut self) -> Ref {
        let mut all = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut all);
        self.0 = std::mem::take(&mut self.0).schemas_from_iter(all);
        Ref::from_schema_name(T::name())
    }
}

/// Body of the request, if the operation takes one, and whether it must come.
fn request_body(operation: Operation, schemas: &mut Schemas) -> Option<(Ref, Required)> {
    match operation {
        Operation::CreateCluster => Some((schemas.add::<CreateCluster>(), Required::True)),
        Operation::SetRotation => Some((schemas.add::<SetRotation>(), Required::True)),
        Operation::SetMaxOffline => Some((schemas.add::<SetMaxOffline>(), Required::True)),
        Operation::RotateKey => Some((schemas.add::<RotateKey>(), Required::False)),
        Operation::RotateCa => Some((schemas.add::<RotateCa>(), Required::False)),
        Operation::CreateToken => Some((schemas.add::<CreateToken>(), Required::False)),
        Operation::RestoreCluster => Some((schemas.add::<RestoreCluster>(), Required::False)),
        Operation::RenameCluster => Some((schemas.add::<RenameCluster>(), Required::True)),
        Operation::SetAdminRoles => Some((schemas.add::<SetRoles>(), Required::True)),
        Operation::SetAdminScope => Some((schemas.add::<SetScope>(), Required::True)),
        _ => None,
    }
}

/// What a success answers.
fn answer(operation: Operation, schemas: &mut Schemas) -> RefOr<Schema> {
    match operation {
        Operation::ListClusters => schemas.add::<Page<Cluster>>().into(),
        Operation::ShowCluster => schemas.add::<Cluster>().into(),
        Operation::CreateCluster
        | Operation::RetireCluster
        | Operation::RestoreCluster
        | Operation::RenameCluster
        | Operation::SetRotation
        | Operation::SetMaxOffline
        | Operation::RotateKey => schemas.add::<Change<Cluster>>().into(),
        Operation::ListWorkers => schemas.add::<Page<Worker>>().into(),
        Operation::BanWorker | Operation::UnbanWorker | Operation::RemoveWorker => {
            schemas.add::<Change<Worker>>().into()
        }
        Operation::ListAdmins => schemas.add::<Page<Admin>>().into(),
        Operation::ShowAdmin => schemas.add::<Admin>().into(),
        Operation::SetAdminRoles | Operation::SetAdminScope | Operation::RemoveAdmin => {
            schemas.add::<Change<Admin>>().into()
        }
        Operation::ListSlots => schemas.add::<Page<Slot>>().into(),
        Operation::ListVersions => schemas.add::<Page<Version>>().into(),
        Operation::DisableVersion
        | Operation::EnableVersion
        | Operation::DestroyVersion
        | Operation::CancelDestroyVersion => schemas.add::<Change<Version>>().into(),
        Operation::ExplainVersion => schemas.add::<Explanation>().into(),
        Operation::CreateToken => schemas.add::<Change<IssuedToken>>().into(),
        Operation::ListTokens => schemas.add::<Page<Token>>().into(),
        Operation::RevokeToken => schemas.add::<Change<Token>>().into(),
        Operation::ListNodes | Operation::ListClusterNodes => schemas.add::<Page<Node>>().into(),
        Operation::BanNode | Operation::UnbanNode | Operation::RemoveNode => {
            schemas.add::<Change<Node>>().into()
        }
        Operation::SearchAudit => schemas.add::<Page<AuditRecord>>().into(),
        Operation::ListAuditHeads => schemas.add::<Page<AuditHead>>().into(),
        Operation::ShowCa => schemas.add::<Ca>().into(),
        Operation::RotateCa | Operation::ReplaceCa => schemas.add::<Change<RotatedCa>>().into(),
        Operation::ShowStatus => schemas.add::<Status>().into(),
        Operation::ShowOpenapi => ObjectBuilder::new().schema_type(Type::Object).build().into(),
    }
}

fn describe(operation: Operation, schemas: &mut Schemas, problem: &Ref) -> OperationBuilder {
    let mut described = OperationBuilder::new()
        .operation_id(Some(operation.id()))
        .tag(operation.id().split('_').next().unwrap_or("other"))
        .summary(Some(operation.summary()));
    for name in operation.parameters() {
        described = described.parameter(path_parameter(name));
    }
    let queries = match operation.kind() {
        Kind::Read => Vec::new(),
        Kind::List if operation == Operation::SearchAudit => search_parameters(),
        Kind::List => page_parameters(operation),
        Kind::Change => change_parameters(operation),
    };
    for parameter in queries {
        described = described.parameter(parameter);
    }
    if let Some((schema, required)) = request_body(operation, schemas) {
        let body =
            RequestBodyBuilder::new().content(JSON, Content::new(Some(schema))).required(Some(required));
        described = described.request_body(Some(body.build()));
    }
    let schema = answer(operation, schemas);
    let created = matches!(operation, Operation::CreateCluster | Operation::CreateToken);
    if created {
        described = described.response("201", success("Created.", schema.clone()));
    }
    let done = if created { "Dry run: nothing was created." } else { "Done." };
    described = described.response("200", success(done, schema));
    described = described.response(
        "429",
        ResponseBuilder::new()
            .description("This caller asks too much; the header says when to try again.")
            .content(MEDIA_TYPE, Content::new(Some(problem.clone())))
            .header(REQUEST_ID, id_header())
            .header("retry-after", Header::new(ObjectBuilder::new().schema_type(Type::Integer).build())),
    );
    // One default answer: every problem has the same shape, and its code says more than its status.
    let content = Content::new(Some(problem.clone()));
    described.response(
        "default",
        ResponseBuilder::new()
            .description("A problem.")
            .content(MEDIA_TYPE, content)
            .header(REQUEST_ID, id_header()),
    )
}

fn success(description: &str, schema: RefOr<Schema>) -> Response {
    ResponseBuilder::new()
        .description(description)
        .content(JSON, Content::new(Some(schema)))
        .header(REQUEST_ID, id_header())
        .build()
}

fn id_header() -> Header {
    Header::new(ObjectBuilder::new().schema_type(Type::String).build())
}

fn text(max: usize) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).max_length(Some(max))
}

fn path_parameter(name: &str) -> Parameter {
    let (schema, description) = match name {
        "cluster" => (text(63).min_length(Some(1)), "Name or cluster id."),
        "version" => (
            ObjectBuilder::new()
                .schema_type(Type::Integer)
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
                .minimum(Some(1))
                .maximum(Some(4_294_967_295_i64)),
            "Version of the key.",
        ),
        "worker" => (text(63).min_length(Some(1)), "Name of the worker within its cluster."),
        "admin" => (text(63).min_length(Some(1)), "Name of the admin."),
        "node" => (text(63).min_length(Some(1)), "Name of the node within its cluster."),
        _ => (text(64).min_length(Some(1)), "Id of the join token."),
    };
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some(description))
        .schema(Some(schema.build()))
        .build()
}

fn optional(name: &str, place: ParameterIn, description: &str, schema: ObjectBuilder) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema.build()))
        .build()
}

fn page_parameters(operation: Operation) -> Vec<Parameter> {
    let limit = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(1))
        .maximum(Some(i64::from(MAX_LIMIT)))
        .default(Some(json!(DEFAULT_LIMIT)));
    let mut parameters = vec![
        optional("limit", ParameterIn::Query, "Items wanted.", limit),
        optional(
            "after",
            ParameterIn::Query,
            "The `next` of the page before.",
            text(MAX_CURSOR).min_length(Some(1)),
        ),
    ];
    match operation {
        Operation::ListClusters => parameters.push(optional(
            "retired",
            ParameterIn::Query,
            "The retired ones too.",
            ObjectBuilder::new().schema_type(Type::Boolean).default(Some(json!(false))),
        )),
        Operation::ListNodes | Operation::ListClusterNodes => parameters.push(optional(
            "unseen",
            ParameterIn::Query,
            "Only nodes that nobody has heard of for so long, such as `30d`.",
            text(40).pattern(Some("^([0-9]{1,5}(d|h|m|s) ?){1,4}$")),
        )),
        _ => {}
    }
    parameters
}

fn search_parameters() -> Vec<Parameter> {
    let time = || {
        let format = SchemaFormat::KnownFormat(KnownFormat::DateTime);
        ObjectBuilder::new().schema_type(Type::String).format(Some(format))
    };
    let chain = text(16).enum_values(Some(["changes", "data"])).default(Some(json!("changes")));
    let searched = || text(MAX_SEARCHED).min_length(Some(1));
    let wanted = [
        ("chain", "The chain.", chain),
        ("from", "Not before this time.", time()),
        ("to", "Before this time.", time()),
        ("who", "A part of the identity that asked.", searched()),
        ("cluster", "Name or cluster id.", searched()),
        ("action", "What was done or called.", searched()),
        (
            "outcome",
            "How it ended: `done`, `not done`, `unknown`, `open`; of calls `ok` or why not.",
            searched(),
        ),
    ];
    let wanted =
        wanted.into_iter().map(|(name, what, schema)| optional(name, ParameterIn::Query, what, schema));
    page_parameters(Operation::SearchAudit).into_iter().chain(wanted).collect()
}

fn change_parameters(operation: Operation) -> Vec<Parameter> {
    let query = ParameterIn::Query;
    let mut parameters = vec![
        optional(
            "reason",
            query.clone(),
            "Why; stands in the audit record. At most 512 bytes.",
            text(MAX_REASON).pattern(Some("^[^\\u0000-\\u001f\\u007f-\\u009f]*$")),
        ),
        optional(
            "dry_run",
            query,
            "Check and describe the change, but do nothing.",
            ObjectBuilder::new().schema_type(Type::Boolean).default(Some(json!(false))),
        ),
        optional(
            IDEMPOTENCY_KEY,
            ParameterIn::Header,
            "The same key with the same request gets the first one's answer.",
            text(MAX_IDEMPOTENCY_KEY).min_length(Some(1)).pattern(Some("^[A-Za-z0-9._~-]+$")),
        ),
    ];
    if operation.has_revision() {
        parameters.push(optional(
            "if-match",
            ParameterIn::Header,
            "The `revision` that the caller has seen, in quotes, of what is changed (a key version's is its \
             cluster's); another one refuses the change.",
            text(22).pattern(Some("^\"[0-9]{1,20}\"$")),
        ));
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

    #[test]
    fn the_document_in_the_tree_is_the_one_of_the_types() {
        let now = document_json();
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(PATH, &now).unwrap();
        }
        let tree = std::fs::read_to_string(PATH).unwrap_or_default();
        assert!(tree == now, "docs/openapi.json is behind: run `make openapi` and look at the diff");
    }

    #[test]
    fn the_page_in_the_tree_is_the_one_of_the_document_in_the_tree() {
        const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/admin-api.md");
        let document = serde_json::from_str(&document_json()).unwrap();
        let now = reference::page(&document);
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(PAGE, &now).unwrap();
        }
        let tree = std::fs::read_to_string(PAGE).unwrap_or_default();
        assert!(tree == now, "docs/admin-api.md is behind: run `make openapi` and look at the diff");
        for operation in Operation::ALL {
            assert!(now.contains(&format!("Operation `{}`.", operation.id())), "{operation}");
        }
    }

    #[test]
    fn every_reference_of_the_document_exists() {
        let text = document_json();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        for piece in text.split("\"#/components/schemas/").skip(1) {
            let name = piece.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name} is missing");
        }
    }

    #[test]
    fn every_operation_is_described_and_no_other() {
        let document: serde_json::Value = serde_json::from_str(&document_json()).unwrap();
        let described: usize =
            document["paths"].as_object().unwrap().values().map(|path| path.as_object().unwrap().len()).sum();
        assert_eq!(described, Operation::ALL.len());
        for operation in Operation::ALL {
            let method = operation.method().as_str().to_lowercase();
            assert_eq!(document["paths"][operation.path()][method]["operationId"], operation.id());
        }
    }

    #[test]
    fn requests_are_closed_and_answers_are_open() {
        let document: serde_json::Value = serde_json::from_str(&document_json()).unwrap();
        let schemas = document["components"]["schemas"].as_object().unwrap();
        for (name, schema) in schemas {
            let request = [
                "CreateCluster",
                "SetRotation",
                "SetMaxOffline",
                "RotateKey",
                "RotateCa",
                "CreateToken",
                "RestoreCluster",
                "RenameCluster",
                "SetRoles",
                "SetScope",
            ]
            .contains(&name.as_str());
            assert_eq!(schema["additionalProperties"] == false, request, "{name}");
        }
    }
}
