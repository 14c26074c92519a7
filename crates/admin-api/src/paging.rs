//! Lists come in pages: `limit` and `after` in, `items` and `next` out.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Items on a page when the caller does not say.
pub const DEFAULT_LIMIT: u32 = 100;

/// The most items on one page; the store's own page limit.
pub const MAX_LIMIT: u32 = 1_000;

/// The longest cursor that is read.
pub const MAX_CURSOR: usize = 512;

/// Query of every list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    /// Items wanted, 1 to 1,000; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The `next` of the page before; absent for the first page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<T> {
    /// The items, in the list's own fixed order.
    pub items: Vec<T>,
    /// Cursor of the next page; absent on the last one. Opaque to callers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl<T: ToSchema> PartialSchema for Page<T> {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .description(Some("One page of a list."))
            .property("items", ArrayBuilder::new().items(Ref::from_schema_name(T::name())))
            .required("items")
            .property(
                "next",
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .description(Some("Cursor of the next page; absent on the last one.")),
            )
            .into()
    }
}

impl<T: ToSchema> ToSchema for Page<T> {
    fn name() -> Cow<'static, str> {
        format!("{}Page", T::name()).into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((T::name().into(), T::schema()));
        T::schemas(schemas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_page_has_no_cursor() {
        let page: Page<u32> = serde_json::from_str(r#"{"items":[1,2],"a_newer_field":true}"#).unwrap();
        assert_eq!(page, Page { items: vec![1, 2], next: None });
        assert_eq!(serde_json::to_string(&page).unwrap(), r#"{"items":[1,2]}"#);
    }
}
